package kvferry_test

import (
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.org/kvferry"
)

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

func TestOptionsThatMakeNoSenseAreRefused(t *testing.T) {
	for _, options := range []kvferry.EngineOptions{
		{CopyThreads: -1}, {CopyThreads: 1<<32 + 1}, {PinnedLimit: -1}, {StagingBytes: -1},
		{CUDADevices: []int{-1}}, {CUDADevices: []int{64}}, {CUDADevices: []int{0}}, // the host alone is asked for
	} {
		options.Devices = kvferry.HostOnly
		engine, err := kvferry.NewEngine(options)
		if !errors.Is(err, kvferry.ErrInvalidArgument) {
			t.Errorf("%+v gave %v", options, err)
		}
		if err == nil {
			engine.Close()
		}
	}
}

func TestEngineClosesUnderLoad(t *testing.T) {
	for round := range 20 {
		engine, err := kvferry.NewEngine(kvferry.EngineOptions{Devices: kvferry.HostOnly})
		if err != nil {
			t.Fatal(err)
		}
		var group sync.WaitGroup
		var ended atomic.Int64
		for worker := range 32 {
			group.Add(1)
			go func() {
				defer group.Done()
				source, target := make([]byte, 1<<20), make([]byte, 1<<20)
				for {
					_, err := engine.SaveRegions(context.Background(), regionsOf(source[:1<<(10+worker%10)]), kvferry.Bytes(target))
					switch {
					case err == nil:
						ended.Add(1)
					case errors.Is(err, kvferry.ErrClosed):
						return
					case errors.Is(err, kvferry.ErrCancelled) && round%2 == 1:
					default:
						t.Error(err)
						return
					}
				}
			}()
		}
		for ended.Load() < 100 {
			time.Sleep(100 * time.Microsecond)
		}
		if round%2 == 1 {
			engine.Cancel()
		}
		if err := engine.Close(); err != nil {
			t.Error(err)
		}
		if err := engine.Close(); err != nil {
			t.Errorf("closing twice gave %v", err)
		}
		group.Wait()
		if _, err := engine.NewBuffer(1); !errors.Is(err, kvferry.ErrClosed) {
			t.Errorf("a buffer of a closed engine gave %v", err)
		}
	}
}
