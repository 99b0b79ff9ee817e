package kvferry_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"testing"

	"example.org/kvferry"
	"example.org/kvferry/internal/baseline"
)

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
