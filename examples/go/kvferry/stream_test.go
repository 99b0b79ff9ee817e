package kvferry_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"example.org/kvferry"
	"example.org/kvferry/internal/baseline"
)

const legacyStream = 1 // CU_STREAM_LEGACY, CUDA's default stream

// newCUDAEngine is one on the simulated driver, which KVFERRY_SIMULATED_CUDA names; without it, on a real one.
func newCUDAEngine(t *testing.T) *kvferry.Engine {
	t.Helper()
	if driver := os.Getenv("KVFERRY_SIMULATED_CUDA"); driver != "" {
		t.Setenv("KVFERRY_CUDA_DRIVER", driver)
	}
	engine, err := kvferry.NewEngine(kvferry.EngineOptions{Devices: kvferry.RequireCUDA})
	if errors.Is(err, kvferry.ErrNoDevice) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := engine.Close(); err != nil {
			t.Error(err)
		}
	})
	return engine
}

func TestEngineOpensTheCUDADevicesThatAreNamed(t *testing.T) {
	driver := os.Getenv("KVFERRY_SIMULATED_CUDA")
	if driver == "" {
		t.Skip("KVFERRY_SIMULATED_CUDA is not set")
	}
	t.Setenv("KVFERRY_CUDA_DRIVER", driver)
	engine, err := kvferry.NewEngine(kvferry.EngineOptions{CUDADevices: []int{0}})
	if err != nil {
		t.Fatal(err)
	}
	if err := engine.Close(); err != nil {
		t.Error(err)
	}
	for _, refused := range []struct {
		options kvferry.EngineOptions
		status  kvferry.Status
		text    string
	}{
		{kvferry.EngineOptions{CUDADevices: []int{0, 63}}, kvferry.ErrNoDevice, "device 63: the CUDA driver shows 1"},
		{kvferry.EngineOptions{CUDADevices: []int{64}}, kvferry.ErrInvalidArgument, "CUDA device 64; they go from 0 to 63"},
		{kvferry.EngineOptions{CUDADevices: []int{-1}}, kvferry.ErrInvalidArgument, "CUDA device -1; they go from 0 to 63"},
		{kvferry.EngineOptions{CUDADevices: []int{0}, Devices: kvferry.HostOnly}, kvferry.ErrInvalidArgument, "host alone"},
	} {
		_, err := kvferry.NewEngine(refused.options)
		if !errors.Is(err, refused.status) || !strings.Contains(err.Error(), refused.text) {
			t.Errorf("%v: %v", refused.options, err)
		}
	}
}

// expectIdle checks that a call has left no transfer behind. The engine forgets a job a moment after its completion.
func expectIdle(t *testing.T, engine *kvferry.Engine) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); inFlight(t, engine) > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d jobs in flight", inFlight(t, engine))
		}
	}
}

func TestStreamCannotWaitWithoutCUDA(t *testing.T) {
	engine := newEngine(t)
	source, target := pattern(4096, 1), make([]byte, 4096)
	cancellable, cancel := context.WithCancel(context.Background())
	defer cancel()
	for _, ctx := range []context.Context{context.Background(), cancellable} {
		for range 100 { // whichever is first, the wait or the end of the transfer
			wait := kvferry.StreamWait(legacyStream, func() { t.Error("then was called") })
			_, err := engine.SaveRegions(ctx, regionsOf(source), kvferry.Bytes(target), wait)
			if !errors.Is(err, kvferry.ErrUnsupported) {
				t.Fatalf("got %v", err)
			}
		}
	}
	expectIdle(t, engine)
	if _, err := engine.SaveRegions(cancellable, regionsOf(source), kvferry.Bytes(target)); err != nil {
		t.Error(err)
	}
}

func TestHandleOfATransferThatAStreamWaitsForIsReleased(t *testing.T) {
	engine := newEngine(t)
	source, target := pattern(1, 1), make([]byte, 1)
	run := func() {
		for range 5000 {
			_, err := engine.SaveRegions(context.Background(), regionsOf(source), kvferry.Bytes(target),
				kvferry.StreamWait(legacyStream, nil))
			if !errors.Is(err, kvferry.ErrUnsupported) {
				t.Fatalf("got %v", err)
			}
		}
		expectIdle(t, engine)
	}
	run() // the library takes what it keeps
	heap := baseline.HeapInUse()
	run()
	if grown := baseline.HeapInUse() - heap; grown > 256<<10 {
		t.Errorf("C's heap has grown by %d bytes", grown)
	}
}

func TestStreamIsGivenItsWorkWhileItWaits(t *testing.T) {
	engine := newCUDAEngine(t)
	source, target := pattern(4096, 1), make([]byte, 4096)
	calls := 0
	wait := kvferry.StreamWait(legacyStream, func() { calls++ })
	for range 100 {
		clear(target)
		_, err := engine.SaveRegions(context.Background(), regionsOf(source), kvferry.Bytes(target), wait, wait,
			kvferry.StreamWait(legacyStream, nil))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(source, target) {
			t.Fatal("damaged")
		}
	}
	if calls != 200 {
		t.Errorf("%d calls, not 2 for each transfer", calls)
	}
	if os.Getenv("KVFERRY_SIMULATED_CUDA") != "" { // a real driver may crash on a stream that was made up
		_, err := engine.SaveRegions(context.Background(), regionsOf(source), kvferry.Bytes(target),
			kvferry.StreamWait(0xdead0, nil))
		if !errors.Is(err, kvferry.ErrInvalidArgument) {
			t.Errorf("a stream that does not exist gave %v", err)
		}
	}
}

func TestAttachingToAnEngineThatIsClosingIsRefusedAtOnce(t *testing.T) {
	engine := newCUDAEngine(t)
	inThen, goOn := make(chan struct{}), make(chan struct{})
	var transfer, closing sync.WaitGroup
	transfer.Add(1)
	go func() {
		defer transfer.Done()
		_, err := engine.SaveRegions(context.Background(), regionsOf(make([]byte, 1)), kvferry.Bytes(make([]byte, 1)),
			kvferry.StreamWait(legacyStream, func() { close(inThen); <-goOn }))
		if err != nil {
			t.Error(err)
		}
	}()
	<-inThen
	for range 2 {
		closing.Add(1)
		go func() {
			defer closing.Done()
			if err := engine.Close(); err != nil {
				t.Error(err)
			}
			if !isClosed(goOn) {
				t.Error("closed with a transfer in flight")
			}
		}()
	}
	for { // until it is closing
		buffer, err := engine.NewBuffer(1)
		if err != nil {
			break
		}
		buffer.Close()
	}
	refused := make(chan error, 1)
	go func() {
		_, err := engine.Attach(1, &sync.Mutex{}, kvferry.AttachOptions{})
		refused <- err
	}()
	select {
	case err := <-refused:
		if !errors.Is(err, kvferry.ErrClosed) {
			t.Errorf("got %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("it waits for the transfer")
	}
	close(goOn)
	transfer.Wait()
	closing.Wait()
}

func TestTransferIsOverWhenTheProgramsFunctionPanics(t *testing.T) {
	engine := newCUDAEngine(t)
	source, target := pattern(32<<20, 1), make([]byte, 32<<20)
	func() {
		defer func() {
			if recover() != "launch failed" {
				t.Error("the panic was lost")
			}
			expectIdle(t, engine)
		}()
		engine.SaveRegions(context.Background(), regionsOf(source), kvferry.Bytes(target),
			kvferry.StreamWait(legacyStream, func() { panic("launch failed") }))
	}()
	for i := range byte(10) {
		if _, err := engine.SaveRegions(context.Background(), regionsOf(pattern(4096, i)), kvferry.Bytes(target)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(pattern(4096, i), target[:4096]) {
			t.Fatal("damaged")
		}
	}
}
