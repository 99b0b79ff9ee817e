package kvferry_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"example.org/kvferry"
	"example.org/kvferry/internal/baseline"
)

func TestBufferCannotBeClosedWhileATransferUsesIt(t *testing.T) {
	engine := newEngine(t)
	const size = 32 << 20
	source := baseline.Alloc(size)
	defer baseline.Free(source)
	refused := false
	for attempt := 0; !refused; attempt++ {
		if attempt == 1000 {
			t.Fatal("never saw the transfer in flight")
		}
		buffer := newBuffer(t, engine, size)
		var completion kvferry.Completion
		var err error
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			completion, err = engine.SaveRegions(context.Background(), regionsOf(source), buffer)
		}()
		for inFlight(t, engine) == 0 && !isClosed(ended) {
			runtime.Gosched()
		}
		for !isClosed(ended) {
			closing := buffer.Close()
			closed := baseline.Monotonic()
			if errors.Is(closing, kvferry.ErrBusy) {
				refused = true
				continue
			}
			<-ended
			if closing != nil || err == nil && completion.Finished > closed {
				t.Fatalf("the buffer was closed in flight (%v)", closing)
			}
		}
		<-ended
		if err != nil {
			t.Fatal(err)
		}
	}
	buffer := newBuffer(t, engine, 1)
	if err := buffer.Close(); err != nil {
		t.Error(err)
	}
	if _, err := engine.SaveRegions(context.Background(), regionsOf(source[:1]), buffer); !errors.Is(err, kvferry.ErrInvalidArgument) {
		t.Errorf("saving into a closed buffer gave %v", err)
	}
	if buffer.Bytes() != nil {
		t.Error("a closed buffer gives its memory")
	}
}

// Go does not know of a transfer that was given the buffer's memory as Bytes: the library refuses to free it.
func TestBufferWhoseCloseWasRefusedIsGivenBackByTheNextClose(t *testing.T) {
	engine := newEngine(t)
	const size = 32 << 20
	source := baseline.Alloc(size)
	defer baseline.Free(source)
	for attempt := 0; ; attempt++ {
		if attempt == 1000 {
			t.Fatal("never saw the transfer in flight")
		}
		buffer := newBuffer(t, engine, size)
		ended := make(chan error, 1)
		go func() {
			_, err := engine.SaveRegions(context.Background(), regionsOf(source), kvferry.Bytes(buffer.Bytes()))
			ended <- err
		}()
		for inFlight(t, engine) == 0 && len(ended) == 0 {
			runtime.Gosched()
		}
		refusal := buffer.Close()
		if err := <-ended; err != nil && refusal != nil {
			t.Fatal(err)
		}
		if refusal == nil {
			continue
		}
		if !errors.Is(refusal, kvferry.ErrBusy) {
			t.Fatalf("closing gave %v", refusal)
		}
		if buffer.Bytes() == nil {
			t.Error("a buffer whose Close was refused has no memory")
		}
		if _, err := engine.SaveRegions(context.Background(), regionsOf(source), buffer); err != nil {
			t.Errorf("saving into it gave %v", err)
		}
		if err := buffer.Close(); err != nil {
			t.Errorf("closing it again gave %v", err)
		}
		if taken := bytesTaken(t, engine); taken != 0 {
			t.Errorf("%d bytes are still taken", taken)
		}
		return
	}
}

// The Buffer is closed for a moment, while the library decides whether the memory can be freed.
func TestACloseThatIsRefusedRefusesNoTransfer(t *testing.T) {
	engine := newEngine(t)
	const size = 8 << 20
	source := baseline.Alloc(size)
	defer baseline.Free(source)
	buffer := newBuffer(t, engine, size)
	memory := buffer.Bytes()
	stop := make(chan struct{})
	var group sync.WaitGroup
	for range 3 { // so that one is in flight nearly always
		group.Add(1)
		go func() {
			defer group.Done()
			for !isClosed(stop) {
				if _, err := engine.SaveRegions(context.Background(), regionsOf(source), kvferry.Bytes(memory)); err != nil {
					t.Error(err)
				}
			}
		}()
	}
	var closing error
	closer := make(chan struct{})
	go func() {
		defer close(closer)
		for !isClosed(stop) {
			if closing = buffer.Close(); closing == nil {
				return
			}
		}
	}()
	var refusal error
	for deadline := time.Now().Add(time.Second); refusal == nil && time.Now().Before(deadline); {
		_, refusal = engine.SaveRegions(context.Background(), nil, buffer.Slice(0, 1))
	}
	close(stop)
	<-closer
	group.Wait()
	if refusal != nil && closing != nil {
		t.Errorf("a transfer got %v, and the buffer was not closed: %v", refusal, closing)
	}
}

func TestCapIsWhatABufferTakesOfThePool(t *testing.T) {
	engine := newEngine(t)
	var taken int64
	for _, size := range []int{1, 5000, 1_000_001, 12_345_678} {
		buffer := newBuffer(t, engine, size)
		taken += int64(buffer.Cap())
		if buffer.Len() != size || len(buffer.Bytes()) != size || cap(buffer.Bytes()) != buffer.Cap() {
			t.Errorf("%d bytes: Len %d, Cap %d, Bytes of %d and %d", size, buffer.Len(), buffer.Cap(), len(buffer.Bytes()), cap(buffer.Bytes()))
		}
		if buffer.Cap() < size || buffer.Cap() > size+size/16+os.Getpagesize() {
			t.Errorf("%d bytes: Cap %d", size, buffer.Cap())
		}
		if got := bytesTaken(t, engine); got != taken {
			t.Errorf("%d bytes are taken, and %d counted", got, taken)
		}
	}
}

func TestSliceOfABufferIsMemory(t *testing.T) {
	engine := newEngine(t)
	buffer := newBuffer(t, engine, 10_000)
	clear(buffer.Bytes()[:buffer.Cap()])
	source := pattern(1000, 1)
	for _, low := range []int{0, 777, buffer.Cap() - 1000} {
		part := buffer.Slice(low, low+1000)
		if part.Len() != 1000 {
			t.Errorf("Len %d", part.Len())
		}
		if _, err := engine.SaveRegions(context.Background(), regionsOf(source), part); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(buffer.Bytes()[low:low+1000], source) {
			t.Errorf("damaged at %d", low)
		}
		target := make([]byte, 1000)
		if _, err := engine.LoadRegions(context.Background(), regionsOf(target), part); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(target, source) {
			t.Errorf("loaded from %d it is damaged", low)
		}
	}
	if _, err := engine.SaveRegions(context.Background(), regionsOf(source), buffer.Slice(0, 999)); !errors.Is(err, kvferry.ErrBufferTooSmall) {
		t.Errorf("a slice that is too small gave %v", err)
	}
	if _, err := engine.SaveRegions(context.Background(), regionsOf(source), kvferry.Slice{}); !errors.Is(err, kvferry.ErrInvalidArgument) {
		t.Errorf("the zero slice gave %v", err)
	}
	part := buffer.Slice(0, 1000)
	if err := buffer.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := engine.SaveRegions(context.Background(), regionsOf(source), part); !errors.Is(err, kvferry.ErrInvalidArgument) {
		t.Errorf("a slice of a closed buffer gave %v", err)
	}
}

func TestSliceKeepsItsBuffer(t *testing.T) {
	engine := newEngine(t)
	part := func() kvferry.Slice {
		buffer, err := engine.NewBuffer(1 << 20)
		if err != nil {
			t.Fatal(err)
		}
		return buffer.Slice(0, 1000)
	}()
	for range 5 {
		runtime.GC()
		time.Sleep(time.Millisecond)
	}
	if bytesTaken(t, engine) == 0 {
		t.Error("the buffer is gone")
	}
	if _, err := engine.SaveRegions(context.Background(), regionsOf(pattern(1000, 1)), part); err != nil {
		t.Error(err)
	}
}

func TestSliceOutOfBoundsPanics(t *testing.T) {
	buffer := newBuffer(t, newEngine(t), 1000)
	for _, bounds := range [][2]int{{-1, 1}, {2, 1}, {0, buffer.Cap() + 1}} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%v did not panic", bounds)
				}
			}()
			buffer.Slice(bounds[0], bounds[1])
		}()
	}
}

func TestForgottenBufferIsGivenBack(t *testing.T) {
	engine := newEngine(t)
	func() {
		if _, err := engine.NewBuffer(1 << 20); err != nil {
			t.Fatal(err)
		}
	}()
	deadline := time.Now().Add(10 * time.Second)
	for bytesTaken(t, engine) > 0 {
		if time.Now().After(deadline) {
			t.Fatalf("%d bytes are still taken", bytesTaken(t, engine))
		}
		runtime.GC()
		time.Sleep(time.Millisecond)
	}
}

func TestForgottenBuffersMakeRoomWhereTheLimitIsReached(t *testing.T) {
	engine, err := kvferry.NewEngine(kvferry.EngineOptions{Devices: kvferry.HostOnly, PinnedLimit: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer engine.Close()
	for i := range 100 {
		if _, err := engine.NewBuffer(1 << 20); err != nil {
			t.Fatalf("buffer %d: %v", i, err)
		}
	}
}

func TestBuffersInUseMakeNoRoom(t *testing.T) {
	engine, err := kvferry.NewEngine(kvferry.EngineOptions{Devices: kvferry.HostOnly, PinnedLimit: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer engine.Close()
	for range 4 {
		newBuffer(t, engine, 1<<20)
	}
	if _, err := engine.NewBuffer(1); !errors.Is(err, kvferry.ErrPinnedLimit) {
		t.Errorf("got %v", err)
	}
}

// Go runs one finalizer at a time, so one that does not return holds up all others.
func TestProgramsFinalizerThatHangsHoldsNoBufferUp(t *testing.T) {
	engine, err := kvferry.NewEngine(kvferry.EngineOptions{Devices: kvferry.HostOnly, PinnedLimit: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer engine.Close()
	newBuffer(t, engine, 1<<20)
	hangs, goOn := make(chan struct{}), make(chan struct{})
	runtime.SetFinalizer(new([64]byte), func(*[64]byte) { close(hangs); <-goOn })
	runtime.GC()
	<-hangs
	defer close(goOn)
	refused := make(chan error)
	go func() {
		_, err := engine.NewBuffer(1)
		refused <- err
	}()
	select {
	case err := <-refused:
		if !errors.Is(err, kvferry.ErrPinnedLimit) {
			t.Errorf("got %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Error("it is still waiting")
	}
}

func TestBufferWhoseMemoryWasHandedOutIsKept(t *testing.T) {
	engine := newEngine(t)
	buffer, err := engine.NewBuffer(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	memory := buffer.Bytes()
	buffer = nil
	for range 5 {
		runtime.GC()
		time.Sleep(time.Millisecond)
	}
	if bytesTaken(t, engine) == 0 {
		t.Error("the buffer is gone, and its memory is still held")
	}
	memory[0] = 1
}
