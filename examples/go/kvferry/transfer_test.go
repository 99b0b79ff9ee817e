package kvferry_test

import (
	"bytes"
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"example.org/kvferry"
	"example.org/kvferry/internal/baseline"
)

// regionsOf describes memory as one run.
func regionsOf(memory []byte) []kvferry.Region {
	return []kvferry.Region{{Address: unsafe.Pointer(unsafe.SliceData(memory)), Width: uint64(len(memory)), Rows: 1}}
}

func pattern(size int, seed byte) []byte {
	memory := make([]byte, size)
	for i := range memory {
		memory[i] = byte(i*7) + byte(i>>8) + seed
	}
	return memory
}

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

// A buffer's memory that is handed to a transfer as Bytes is refused by the library, not by Go.
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

// While the library is asked whether the buffer can be freed, the Buffer is closed for a moment.
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

func isClosed(done chan struct{}) bool {
	select {
	case <-done:
		return true
	default:
		return false
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

// A finalizer that does not return holds up all others, Go says.
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

// Everything that can be counted is the same after 10,000 saves and loads at the same time, of which many were cancelled
// at a random moment.
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

func TestRegisteredMemoryIsRefusedTwiceAndReleased(t *testing.T) {
	engine := newEngine(t)
	memory := make([]byte, 1<<20)
	registration, err := engine.Register(memory)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := engine.Register(memory[1:]); !errors.Is(err, kvferry.ErrBusy) {
		t.Errorf("registering twice gave %v", err)
	}
	if _, err := engine.SaveRegions(context.Background(), regionsOf(pattern(1<<20, 3)), kvferry.Bytes(memory)); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := registration.Close(); err != nil {
			t.Error(err)
		}
	}
	if !bytes.Equal(memory, pattern(1<<20, 3)) {
		t.Error("damaged")
	}
}

func TestForgottenRegistrationSaysWhereItWasMade(t *testing.T) {
	const child = "KVFERRY_TEST_FORGETS"
	if os.Getenv(child) != "" { // what follows ends the process
		registerAndForget(t)
		for range 100 {
			runtime.GC()
			time.Sleep(10 * time.Millisecond)
		}
		return
	}
	command := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
	command.Env = append(os.Environ(), child+"=1")
	said, err := command.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		t.Fatalf("the process ended with %v:\n%s", err, said)
	}
	for _, word := range []string{"panic: kvferry: ", "Registration", "Close", "registerAndForget", "transfer_test.go:", "(*Registration)"} {
		if !strings.Contains(string(said), word) {
			t.Errorf("it does not say %q:\n%s", word, said)
		}
	}
}

// A copy that does not end may still write to the memory, so that it stays pinned for ever. Who has closed the Registration
// has done what can be done.
func TestRegistrationOfALostDeviceMayBeDropped(t *testing.T) {
	const child = "KVFERRY_TEST_LOSES"
	driver := os.Getenv("KVFERRY_SIMULATED_CUDA")
	if driver == "" {
		t.Skip("no simulated CUDA driver: KVFERRY_SIMULATED_CUDA names it")
	}
	if os.Getenv(child) == "" {
		command := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
		command.Env = append(os.Environ(), child+"=1", "KVFERRY_STUCK_SECONDS=1", "KVFSIM_HOLD=copy:1+")
		if said, err := command.CombinedOutput(); err != nil {
			t.Fatalf("%v:\n%s", err, said)
		}
		return
	}
	const size = 4 << 20
	engine := newCUDAEngine(t)
	device := baseline.DeviceAlloc(driver, size)
	if device == 0 {
		t.Fatal("no device memory")
	}
	var address uintptr
	func() {
		memory := make([]byte, size)
		address = uintptr(unsafe.Pointer(&memory[0]))
		registration, err := engine.Register(memory)
		if err != nil {
			t.Fatal(err)
		}
		region := kvferry.Region{Address: kvferry.At(device), Width: size, Rows: 1}
		_, err = engine.SaveRegions(context.Background(), []kvferry.Region{region}, kvferry.Bytes(memory))
		if !errors.Is(err, kvferry.ErrDeviceLost) {
			t.Fatalf("the save gave %v", err)
		}
		for range 2 {
			if err := registration.Close(); !errors.Is(err, kvferry.ErrDeviceLost) {
				t.Errorf("closing gave %v", err)
			}
		}
	}()
	for range 50 {
		runtime.GC()
		time.Sleep(time.Millisecond)
		if again := make([]byte, size); uintptr(unsafe.Pointer(&again[0])) == address {
			t.Fatal("the memory was given to somebody else")
		}
	}
}

//go:noinline
func registerAndForget(t *testing.T) {
	engine, err := kvferry.NewEngine(kvferry.EngineOptions{Devices: kvferry.HostOnly})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := engine.Register(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
}

func TestClosedRegistrationMayBeDropped(t *testing.T) {
	engine := newEngine(t)
	func() {
		registration, err := engine.Register(make([]byte, 1<<20))
		if err != nil {
			t.Fatal(err)
		}
		if err := registration.Close(); err != nil {
			t.Fatal(err)
		}
	}()
	for range 5 {
		runtime.GC()
		time.Sleep(time.Millisecond)
	}
}

func TestRegistrationMayBeClosedAfterItsEngine(t *testing.T) {
	engine, err := kvferry.NewEngine(kvferry.EngineOptions{Devices: kvferry.HostOnly})
	if err != nil {
		t.Fatal(err)
	}
	memory := make([]byte, 1<<20)
	registration, err := engine.Register(memory)
	if err != nil {
		t.Fatal(err)
	}
	if err := engine.Close(); err != nil {
		t.Fatal(err)
	}
	if err := registration.Close(); err != nil {
		t.Error(err)
	}
	again, err := newEngine(t).Register(memory)
	if err != nil {
		t.Fatalf("registering the memory again gave %v", err)
	}
	if err := again.Close(); err != nil {
		t.Error(err)
	}
}

func countDescriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
