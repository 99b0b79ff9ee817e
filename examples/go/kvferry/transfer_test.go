package kvferry_test

import (
	"bytes"
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.org/kvferry"
	"example.org/kvferry/internal/baseline"
)

func TestCancelledTransferIsWaitedForAndSaysWhy(t *testing.T) {
	engine := newEngine(t)
	const size = 64 << 20
	source, target := baseline.Alloc(size), baseline.Alloc(size)
	defer baseline.Free(source)
	defer baseline.Free(target)
	why := errors.New("the user has left")
	for attempt := 0; ; attempt++ {
		ctx, cancel := context.WithCancelCause(context.Background())
		go cancel(why)
		_, err := engine.SaveRegions(ctx, regionsOf(source), kvferry.Bytes(target))
		if n := inFlight(t, engine); n != 0 {
			// The engine forgets a job a moment after its completion.
			time.Sleep(10 * time.Millisecond)
			if n := inFlight(t, engine); n != 0 {
				t.Fatalf("%d jobs in flight after the call has returned", n)
			}
		}
		if err == nil {
			if attempt == 1000 {
				t.Fatal("no cancellation was ever in time")
			}
			continue
		}
		if !errors.Is(err, kvferry.ErrCancelled) || !errors.Is(err, why) {
			t.Fatalf("cancelling gave %v", err)
		}
		return
	}
}

func TestContextThatHasEndedSubmitsNothing(t *testing.T) {
	engine := newEngine(t)
	ctx, cancel := context.WithTimeout(context.Background(), 0)
	defer cancel()
	_, err := engine.SaveRegions(ctx, regionsOf(make([]byte, 1)), kvferry.Bytes(make([]byte, 1)))
	if !errors.Is(err, kvferry.ErrCancelled) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

// After 10,000 saves and loads at the same time, of which many are cancelled at a random moment, everything that can be
// counted is as before.
func TestNothingLeaksUnderRandomCancellation(t *testing.T) {
	const transfers, size = 10_000, 48 << 10 // the smaller ones are copied at once, by the call
	goroutines, descriptors := runtime.NumGoroutine(), countDescriptors(t)
	engine, err := kvferry.NewEngine(kvferry.EngineOptions{Devices: kvferry.HostOnly})
	if err != nil {
		t.Fatal(err)
	}
	var cancelledCount, moved, mostInFlight atomic.Int64
	content := pattern(size+256, 1)
	run := func(count int) {
		start := make(chan struct{})
		var group sync.WaitGroup
		for worker := range count {
			group.Add(1)
			go func() {
				defer group.Done()
				random := rand.New(rand.NewPCG(uint64(worker), uint64(count)))
				want := content[worker%256:][:1+random.IntN(size)]
				buffer, err := engine.NewBuffer(size)
				if err != nil {
					t.Error(err)
					return
				}
				var memory kvferry.Memory = buffer
				if random.IntN(2) == 0 {
					memory = kvferry.Bytes(make([]byte, size))
				}
				priority := kvferry.WithPriority(kvferry.Priority(random.IntN(2)))
				<-start
				ctx, cancel := context.WithCancel(context.Background())
				defer cancel()
				if random.IntN(2) == 0 {
					time.AfterFunc(time.Duration(random.IntN(2_000))*time.Microsecond, cancel)
				}
				completion, err := engine.SaveRegions(ctx, regionsOf(want), memory, priority)
				if err == nil {
					got := make([]byte, len(want))
					if completion, err = engine.LoadRegions(ctx, regionsOf(got), memory, priority); err == nil {
						moved.Add(1)
						if !bytes.Equal(got, want) {
							t.Errorf("transfer of %d bytes is damaged", len(want))
						}
					}
				}
				if errors.Is(err, kvferry.ErrCancelled) && errors.Is(err, context.Canceled) {
					if completion.Submitted != 0 { // else it was not in flight
						cancelledCount.Add(1)
					}
				} else if err != nil {
					t.Error(err)
				}
				if err := buffer.Close(); err != nil {
					t.Error(err)
				}
			}()
		}
		close(start)
		ended := make(chan struct{})
		go func() { group.Wait(); close(ended) }()
		for !isClosed(ended) {
			mostInFlight.Store(max(mostInFlight.Load(), int64(inFlight(t, engine))))
			time.Sleep(100 * time.Microsecond)
		}
	}
	run(transfers) // what the library keeps for as many
	// The heap also holds what every thread keeps, of which Go starts as many as it needs. A leak is there every time.
	grown := int64(math.MaxInt64)
	for round := 0; round < 5 && grown > 16*transfers; round++ {
		heap := baseline.HeapInUse()
		run(transfers)
		grown = min(grown, baseline.HeapInUse()-heap)
	}
	if grown > 16*transfers {
		t.Errorf("C's heap has grown by %d bytes every time", grown)
	}
	if cancelledCount.Load() < 10 || moved.Load() < 100 || mostInFlight.Load() < 10 {
		t.Errorf("%d cancelled, %d moved, at most %d in flight: the test has lost its point", cancelledCount.Load(),
			moved.Load(), mostInFlight.Load())
	}
	// Go keeps the threads that it starts for goroutines that are in C at the same time.
	if tasks, err := os.ReadDir("/proc/self/task"); err != nil || len(tasks) > 200 {
		t.Errorf("%d threads, %v", len(tasks), err)
	}
	if taken := bytesTaken(t, engine); taken != 0 {
		t.Errorf("%d bytes of the pool are still taken", taken)
	}
	if err := engine.Close(); err != nil {
		t.Fatal(err)
	}
	if n := countDescriptors(t); n > descriptors {
		t.Errorf("%d descriptors, %d before", n, descriptors)
	}
	deadline := time.Now().Add(5 * time.Second)
	for runtime.NumGoroutine() > goroutines && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	if n := runtime.NumGoroutine(); n > goroutines {
		t.Errorf("%d goroutines, %d before", n, goroutines)
	}
	for range 3 { // a runtime.Pinner that still pins panics as it is collected
		runtime.GC()
		time.Sleep(10 * time.Millisecond)
	}
	t.Logf("%d moved, %d cancelled, at most %d in flight", moved.Load(), cancelledCount.Load(), mostInFlight.Load())
}

func TestATransferAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	engine := newEngine(t)
	source, own := make([]byte, 4096), make([]byte, 4096)
	regions := regionsOf(source)
	buffer := newBuffer(t, engine, 4096)
	part := kvferry.Memory(buffer.Slice(0, 4096))
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	for name, save := range map[string]func() error{
		"buffer": func() error {
			_, err := engine.SaveRegions(context.Background(), regions, buffer)
			return err
		},
		"bytes": func() error {
			_, err := engine.SaveRegions(context.Background(), regions, kvferry.Bytes(own), kvferry.WithPriority(kvferry.Urgent))
			return err
		},
		"slice": func() error {
			_, err := engine.SaveRegions(context.Background(), regions, part)
			return err
		},
		"cancellable": func() error {
			_, err := engine.LoadRegions(ctx, regions, buffer)
			return err
		},
	} {
		if n := testing.AllocsPerRun(1000, func() {
			if err := save(); err != nil {
				t.Fatal(err)
			}
		}); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}
