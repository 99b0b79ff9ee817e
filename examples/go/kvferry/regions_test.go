package kvferry_test

import (
	"bytes"
	"context"
	"runtime"
	"sync"
	"testing"
	"unsafe"

	"example.org/kvferry"
)

func TestRegionsIgnoreTheModesOfSequences(t *testing.T) {
	engine := newEngine(t)
	from, to := pattern(100, 1), newBuffer(t, engine, 100)
	modes := []kvferry.Option{kvferry.WithMode(kvferry.Snapshot), kvferry.Ahead()}
	if _, err := engine.SaveRegions(context.Background(), regionsOf(from), to, modes...); err != nil {
		t.Error(err)
	}
	if _, err := engine.LoadRegions(context.Background(), regionsOf(from), to, modes...); err != nil {
		t.Error(err)
	}
}

func TestRegionsComeBackAsTheyWere(t *testing.T) {
	engine := newEngine(t)
	// Rows of 3 KiB at a pitch of 4 KiB, packed in the buffer.
	const rows, width, pitch = 100, 3 << 10, 4 << 10
	source := pattern(rows*pitch, 1)
	regions := []kvferry.Region{{Address: unsafe.Pointer(&source[0]), Width: width, Rows: rows, Pitch: pitch, BufferPitch: width}}
	size, err := kvferry.RegionsSize(regions)
	if err != nil || size != rows*width {
		t.Fatalf("size is %d, %v", size, err)
	}
	buffer := newBuffer(t, engine, int(size))
	completion, err := engine.SaveRegions(context.Background(), regions, buffer)
	if err != nil {
		t.Fatal(err)
	}
	if completion.Bytes != size || completion.Fragments != rows || completion.Took() <= 0 {
		t.Errorf("completion says %+v", completion)
	}
	target := make([]byte, len(source))
	regions[0].Address = unsafe.Pointer(&target[0])
	if _, err := engine.LoadRegions(context.Background(), regions, kvferry.Bytes(buffer.Bytes())); err != nil {
		t.Fatal(err)
	}
	for row := range rows {
		if !bytes.Equal(target[row*pitch:][:width], source[row*pitch:][:width]) {
			t.Fatalf("row %d differs", row)
		}
	}
}

func TestGoMemoryIsKeptWhileInFlight(t *testing.T) {
	engine := newEngine(t)
	stop := make(chan struct{})
	var group sync.WaitGroup
	group.Add(1)
	go func() { // what a collector frees, others get
		defer group.Done()
		for {
			select {
			case <-stop:
				return
			default:
				runtime.GC()
				for range 64 {
					_ = pattern(64<<10, 0xee)
				}
			}
		}
	}()
	for i := range 200 {
		saved := make([]byte, 64<<10)
		// The source is reachable through the region only.
		if _, err := engine.SaveRegions(context.Background(), regionsOf(pattern(64<<10, byte(i))), kvferry.Bytes(saved)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(saved, pattern(64<<10, byte(i))) {
			t.Fatalf("save %d is damaged", i)
		}
	}
	close(stop)
	group.Wait()
}
