package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"
	"unsafe"

	"example.org/kvferry"
	"github.com/hybridgroup/yzma/pkg/llama"
)

const testModel = "../../../../build/models/kvcache.gguf"

func TestMain(m *testing.M) {
	if err := loadLibrary(testLibrary()); err != nil {
		fmt.Println("skipped:", err)
		os.Exit(0)
	}
	if _, err := os.Stat(testModel); err != nil {
		fmt.Println("skipped: no model (run `make go-kvcache` in the root of kvferry):", err)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func testLibrary() string {
	return cmp.Or(os.Getenv("KVFERRY_LLAMA_LIB"), "../../../../build/llama")
}

func tokens(n int, seed uint64) []llama.Token {
	random := rand.New(rand.NewPCG(seed, 2))
	list := make([]llama.Token, n)
	for i := range list {
		list[i] = llama.Token(random.IntN(500))
	}
	return list
}

// newModel opens the model with an engine attached, and `length` tokens in every sequence that is named.
func newModel(tb testing.TB, sequences, length int, filled ...llama.SeqId) (*model, kvferryMover) {
	tb.Helper()
	m, err := openModel(testModel, sequences, 1024, 1)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(m.close)
	engine, err := kvferry.NewEngine(kvferry.EngineOptions{})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := engine.Close(); err != nil {
			tb.Error(err)
		}
	})
	f, err := newKvferryMover(engine, m)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := f.llama.Close(); err != nil {
			tb.Error(err)
		}
	})
	for _, sequence := range filled {
		if _, err := m.feed(context.Background(), sequence, 0, tokens(length, uint64(sequence))); err != nil {
			tb.Fatal(err)
		}
	}
	return m, f
}

func save(tb testing.TB, f kvferryMover, sequence llama.SeqId) *kvferry.Buffer {
	tb.Helper()
	size, err := f.size(sequence)
	if err != nil {
		tb.Fatal(err)
	}
	state, err := f.engine.NewBuffer(size)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { state.Close() })
	if _, err := f.save(context.Background(), sequence, state); err != nil {
		tb.Fatal(err)
	}
	return state
}

func TestSavedStateIsLlamaCppsOwn(t *testing.T) {
	m, f := newModel(t, 2, 300, 0)
	own := llamaMover{m}
	size, err := own.size(0)
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, size)
	if _, err := own.saveBytes(0, want); err != nil {
		t.Fatal(err)
	}
	state := save(t, f, 0)
	if !bytes.Equal(state.Bytes(), want) {
		t.Fatal("the states differ")
	}
	// And loaded into the other sequence by either it continues in the same way.
	next := tokens(1, 9)
	if _, err := f.load(context.Background(), 1, state); err != nil {
		t.Fatal(err)
	}
	ferried, err := m.feed(context.Background(), 1, 300, next)
	if err != nil {
		t.Fatal(err)
	}
	m.clear(1)
	if _, err := own.loadBytes(1, want); err != nil {
		t.Fatal(err)
	}
	loaded, err := m.feed(context.Background(), 1, 300, next)
	if err != nil {
		t.Fatal(err)
	}
	original, err := m.feed(context.Background(), 0, 300, next)
	if err != nil {
		t.Fatal(err)
	}
	if !sameBits(ferried, loaded) || !sameBits(ferried, original) {
		t.Error("the logits differ")
	}
}

func TestALoadAheadLeavesTheSame(t *testing.T) {
	_, f := newModel(t, 2, 300, 0)
	state := save(t, f, 0)
	completion, err := f.llama.Sequence(1).Load(context.Background(), state, kvferry.Ahead())
	if err != nil {
		t.Fatal(err)
	}
	if completion.Ahead || completion.Mode != 0 { // this cache is in host memory
		t.Errorf("%+v", completion)
	}
	loaded := save(t, f, 1)
	if _, err := f.llama.Sequence(1).Load(context.Background(), state); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(loaded.Bytes(), save(t, f, 1).Bytes()) {
		t.Error("the states differ")
	}
}

func TestGoMemoryHoldsAStateToo(t *testing.T) {
	_, f := newModel(t, 1, 100, 0)
	size, err := f.size(0)
	if err != nil {
		t.Fatal(err)
	}
	state := make([]byte, size)
	completion, err := f.llama.Sequence(0).Save(context.Background(), kvferry.Bytes(state))
	if err != nil {
		t.Fatal(err)
	}
	if completion.Bytes != int64(size) || completion.Mode != kvferry.InPlace || completion.Fragments == 0 {
		t.Errorf("%+v", completion)
	}
	if !bytes.Equal(state, save(t, f, 0).Bytes()) {
		t.Error("the states differ")
	}
}

func TestBufferHoldsASmallerState(t *testing.T) {
	_, f := newModel(t, 2, 100, 0)
	want := save(t, f, 0)
	buffer, err := f.engine.NewBuffer(2 * want.Len())
	if err != nil {
		t.Fatal(err)
	}
	defer buffer.Close()
	completion, err := f.llama.Sequence(0).Save(context.Background(), buffer)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.llama.Sequence(1).Load(context.Background(), buffer.Slice(0, int(completion.Bytes))); err != nil {
		t.Fatal(err)
	}
	loaded := save(t, f, 1)
	if _, err := f.llama.Sequence(1).Load(context.Background(), want); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(loaded.Bytes(), save(t, f, 1).Bytes()) {
		t.Error("the states differ")
	}
}

func TestRemovedSequenceIsEmpty(t *testing.T) {
	_, f := newModel(t, 1, 20, 0)
	if err := f.llama.Sequence(0).Remove(); err != nil {
		t.Fatal(err)
	}
	if _, err := f.llama.Sequence(0).Save(context.Background(), kvferry.Bytes(make([]byte, 1<<20))); !errors.Is(err, kvferry.ErrSequenceEmpty) {
		t.Errorf("got %v", err)
	}
}

func TestStateThatIsRefusedCostsTheSequenceNothing(t *testing.T) {
	_, f := newModel(t, 1, 50, 0)
	state := save(t, f, 0)
	damaged := bytes.Clone(state.Bytes())
	damaged[0]++
	if _, err := f.llama.Sequence(0).Load(context.Background(), kvferry.Bytes(damaged)); !errors.Is(err, kvferry.ErrStateDamaged) {
		t.Errorf("got %v", err)
	}
	if !bytes.Equal(save(t, f, 0).Bytes(), state.Bytes()) {
		t.Error("the sequence has changed")
	}
}

// Of a context that has held nothing yet the format is not known, so what is trusted reaches libllama.
func TestTrustedStateIsLeftToLibllama(t *testing.T) {
	_, f := newModel(t, 1, 50, 0)
	damaged := bytes.Clone(save(t, f, 0).Bytes())
	damaged[0]++
	_, empty := newModel(t, 1, 50)
	for _, c := range []struct {
		options []kvferry.Option
		want    error
	}{{nil, kvferry.ErrStateDamaged}, {[]kvferry.Option{kvferry.TrustState()}, kvferry.ErrLlama}} {
		_, err := empty.llama.Sequence(0).Load(context.Background(), kvferry.Bytes(damaged), c.options...)
		if !errors.Is(err, c.want) {
			t.Errorf("%v, not %v", err, c.want)
		}
	}
}

func TestRefusals(t *testing.T) {
	_, f := newModel(t, 2, 50, 0)
	ctx := context.Background()
	state := save(t, f, 0)
	damaged := bytes.Clone(state.Bytes())
	damaged[0]++
	small := kvferry.Bytes(make([]byte, 100))
	for name, refusal := range map[string]struct {
		do   func() error
		want error
	}{
		"an empty sequence": {func() error { _, err := f.llama.Sequence(1).Save(ctx, small); return err }, kvferry.ErrSequenceEmpty},
		"no such sequence":  {func() error { _, err := f.llama.Sequence(7).Size(); return err }, kvferry.ErrSequenceRange},
		"a small buffer":    {func() error { _, err := f.llama.Sequence(0).Save(ctx, small); return err }, kvferry.ErrBufferTooSmall},
		"a damaged state":   {func() error { _, err := f.llama.Sequence(1).Load(ctx, kvferry.Bytes(damaged)); return err }, kvferry.ErrStateDamaged},
		"a truncated state": {func() error { _, err := f.llama.Sequence(1).Load(ctx, kvferry.Bytes(damaged[:1000])); return err }, kvferry.ErrStateDamaged},
		"an engine in use":  {func() error { return f.engine.Close() }, kvferry.ErrBusy},
		"no lock":           {func() error { _, err := f.engine.Attach(1, nil, kvferry.AttachOptions{}); return err }, kvferry.ErrInvalidArgument},
		"no such library": {func() error {
			_, err := f.engine.Attach(1, &sync.Mutex{}, kvferry.AttachOptions{Library: "/nowhere"})
			return err
		}, kvferry.ErrLibraryNotFound},
	} {
		if err := refusal.do(); !errors.Is(err, refusal.want) {
			t.Errorf("%s gave %v", name, err)
		}
	}
}

// Sequences are saved and loaded while one decodes without a pause, and many of the transfers are cancelled. The states
// that come through are whole, and a load that does not come through leaves its sequence empty.
func TestSequencesUnderRandomCancellation(t *testing.T) {
	const sequences, rounds, length = 4, 100, 120
	m, f := newModel(t, sequences, length, 0, 1, 2, 3)
	stop := make(chan struct{})
	var decoding, moving sync.WaitGroup
	decoding.Go(func() {
		for position := length; ; position++ {
			select {
			case <-stop:
				return
			default:
			}
			if position == 1000 {
				m.clear(0)
				position = 0
			}
			if _, err := m.feed(context.Background(), 0, position, tokens(1, uint64(position))); err != nil {
				t.Error(err)
				return
			}
		}
	})
	var mutex sync.Mutex
	cancelled, whole := 0, 0
	for sequence := int32(1); sequence < sequences; sequence++ {
		want := save(t, f, llama.SeqId(sequence))
		moving.Go(func() {
			random := rand.New(rand.NewPCG(uint64(sequence), 3))
			s := f.llama.Sequence(sequence)
			state := make([]byte, want.Len())
			for range rounds {
				ctx, cancel := context.WithCancel(context.Background())
				if random.IntN(2) == 0 {
					time.AfterFunc(time.Duration(random.IntN(8000))*time.Microsecond, cancel)
				}
				_, err := s.Save(ctx, kvferry.Bytes(state))
				if err == nil && !bytes.Equal(state, want.Bytes()) {
					t.Error("a save is damaged")
				}
				if err == nil {
					_, err = s.Load(ctx, kvferry.Bytes(state))
				}
				cancel()
				mutex.Lock()
				if err == nil {
					whole++
				} else {
					cancelled++
				}
				mutex.Unlock()
				if err == nil {
					continue
				}
				if !errors.Is(err, kvferry.ErrCancelled) || !errors.Is(err, context.Canceled) {
					t.Errorf("got %v", err)
				}
				// As it was, or empty: never a part of it.
				if size, err := s.Size(); err != nil || size != want.Len() && size > 1000 {
					t.Errorf("size %d, %v", size, err)
				}
				if _, err := s.Load(context.Background(), want); err != nil {
					t.Error(err)
				}
			}
		})
	}
	moving.Wait()
	close(stop)
	decoding.Wait()
	if cancelled == 0 || whole == 0 {
		t.Errorf("%d cancelled, %d whole: the test has lost its point", cancelled, whole)
	}
	t.Logf("%d whole, %d cancelled", whole, cancelled)
}

// announcedLock says that somebody is about to wait for it.
type announcedLock struct {
	sync.Locker
	asked chan struct{}
}

func (l announcedLock) Lock() {
	l.asked <- struct{}{}
	l.Locker.Lock()
}

func TestLoadThatIsTooLateWhenItHasTheLockLeavesTheSequence(t *testing.T) {
	m, f := newModel(t, 2, 50, 0, 1)
	state := save(t, f, 0)
	before := save(t, f, 1)
	lock := announcedLock{&m.mutex, make(chan struct{}, 8)}
	attached, err := f.engine.Attach(uintptr(m.context), lock, kvferry.AttachOptions{})
	if err != nil {
		t.Fatal(err)
	}
	<-lock.asked

	ctx, cancel := context.WithCancelCause(context.Background())
	late := errors.New("too late")
	m.mutex.Lock()
	ended := make(chan error)
	go func() {
		_, err := attached.Sequence(1).Load(ctx, state)
		ended <- err
	}()
	<-lock.asked
	cancel(late)
	m.mutex.Unlock()
	if err := <-ended; !errors.Is(err, kvferry.ErrCancelled) || !errors.Is(err, late) {
		t.Errorf("got %v", err)
	}
	if len(lock.asked) > 0 {
		t.Error("nothing was begun, and the lock was waited for a second time")
	}
	if !bytes.Equal(save(t, f, 1).Bytes(), before.Bytes()) {
		t.Error("the sequence has changed")
	}
	if err := attached.Close(); err != nil {
		t.Error(err)
	}
}

func TestWhoeverNeedsNotTheContextDoesNotWaitForIt(t *testing.T) {
	m, f := newModel(t, 2, 50, 0)
	other, _ := newModel(t, 2, 50)
	state := save(t, f, 0)
	lock := announcedLock{&m.mutex, make(chan struct{}, 8)}
	m.mutex.Lock()
	var waiting sync.WaitGroup
	waiting.Go(func() {
		attached, err := f.engine.Attach(uintptr(m.context), lock, kvferry.AttachOptions{})
		if err != nil {
			t.Error(err)
			return
		}
		if err := attached.Close(); err != nil {
			t.Error(err)
		}
	})
	<-lock.asked
	for name, call := range map[string]func() error{
		"Engine.Describe": func() error { _, err := f.engine.Describe(); return err },
		"Engine.Trim":     func() error { return f.engine.Trim() },
		"Llama.Describe":  func() error { _, err := f.llama.Describe(); return err },
		"a buffer": func() error {
			buffer, err := f.engine.NewBuffer(1 << 20)
			if err != nil {
				return err
			}
			return buffer.Close()
		},
		"a transfer": func() error {
			region := kvferry.Region{Address: unsafe.Pointer(&make([]byte, 1<<20)[0]), Width: 1 << 20, Rows: 1}
			_, err := f.engine.SaveRegions(context.Background(), []kvferry.Region{region}, kvferry.Bytes(make([]byte, 1<<20)))
			return err
		},
		"another context": func() error {
			attached, err := f.engine.Attach(uintptr(other.context), &other.mutex, kvferry.AttachOptions{})
			if err != nil {
				return err
			}
			if _, err := attached.Sequence(0).Load(context.Background(), state); err != nil {
				return err
			}
			return attached.Close()
		},
		"Engine.Close": func() error {
			if err := f.engine.Close(); !errors.Is(err, kvferry.ErrBusy) {
				return fmt.Errorf("got %w", err)
			}
			return nil
		},
	} {
		ended := make(chan error, 1)
		go func() { ended <- call() }()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		case <-time.After(10 * time.Second):
			t.Errorf("%s waits for the context's lock", name)
		}
	}
	m.mutex.Unlock()
	waiting.Wait()
}

// A process opens the CUDA driver once, so the simulated one has a process of its own.
func TestLoadLeavesNoHalfOfAStateWhenTheProgramsFunctionPanics(t *testing.T) {
	const child = "KVFERRY_TEST_PANICS"
	driver := os.Getenv("KVFERRY_SIMULATED_CUDA")
	if os.Getenv(child) == "" {
		if driver == "" {
			t.Skip("no simulated CUDA driver: KVFERRY_SIMULATED_CUDA names it")
		}
		command := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
		command.Env = append(os.Environ(), child+"=1", "KVFERRY_CUDA_DRIVER="+driver)
		if said, err := command.CombinedOutput(); err != nil {
			t.Fatalf("%v:\n%s", err, said)
		}
		return
	}
	m, f := newModel(t, 2, 1000, 0, 1)
	state, other := save(t, f, 0), save(t, f, 1)
	load := func(state *kvferry.Buffer, options ...kvferry.Option) {
		defer func() { recover() }()
		if _, err := f.llama.Sequence(1).Load(context.Background(), state, options...); err != nil {
			t.Error(err)
		}
	}
	content := func() []byte { // by llama.cpp's own calls: those of kvferry's would empty the sequence
		size, err := llamaMover{m}.size(1)
		if err != nil {
			t.Fatal(err)
		}
		bytes := make([]byte, size)
		if _, err := (llamaMover{m}).saveBytes(1, bytes); err != nil {
			t.Fatal(err)
		}
		return bytes
	}
	load(state)
	whole := content()
	const legacyStream = 1
	empty := 0
	for attempt := 0; empty < 5; attempt++ {
		if attempt == 500 {
			t.Fatal("no load was cancelled in time")
		}
		load(other) // what is not overwritten is seen
		load(state, kvferry.StreamWait(legacyStream, func() { panic("launch failed") }))
		found := content()
		if len(found) < len(whole)/2 {
			empty++
		} else if !bytes.Equal(found, whole) {
			t.Fatal("the sequence holds a part of the state")
		}
	}
}

// libllama's own calls then run on a thread of the engine's: whoever has the lock must find the context at rest.
func TestBlockingTransfersHoldTheLockUntilTheyHaveEnded(t *testing.T) {
	m, f := newModel(t, 2, 500, 0)
	blocking, err := f.engine.Attach(uintptr(m.context), &m.mutex, kvferry.AttachOptions{ForceBlocking: true})
	if err != nil {
		t.Fatal(err)
	}
	defer blocking.Close()
	state := save(t, f, 0)
	copied := make([]byte, state.Len())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for range 50 {
			if _, err := blocking.Sequence(0).Save(context.Background(), kvferry.Bytes(copied)); err != nil {
				t.Error(err)
				return
			}
			if _, err := blocking.Sequence(1).Load(context.Background(), state); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	for running := true; running; {
		select {
		case <-ended:
			running = false
		default:
		}
		if _, err := f.llama.Sequence(0).Size(); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(copied, state.Bytes()) {
		t.Error("the states differ")
	}
}

func TestLlamaClosesUnderLoad(t *testing.T) {
	for range 5 {
		_, f := newModel(t, 3, 60, 0, 1, 2)
		var group sync.WaitGroup
		for sequence := range int32(3) {
			state := save(t, f, llama.SeqId(sequence))
			group.Go(func() {
				for {
					_, err := f.llama.Sequence(sequence).Load(context.Background(), state)
					if errors.Is(err, kvferry.ErrClosed) {
						return
					}
					if err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		time.Sleep(5 * time.Millisecond)
		if err := f.llama.Close(); err != nil {
			t.Error(err)
		}
		group.Wait()
	}
}

// Save and load against llama.cpp's own calls, on the same context.
func BenchmarkSequence(b *testing.B) {
	m, f := newModel(b, 2, 1000, 0)
	own := llamaMover{m}
	state := save(b, f, 0)
	memory := make([]byte, state.Len())
	ctx := context.Background()
	urgent := kvferry.WithPriority(kvferry.Urgent)
	for _, bench := range []struct {
		name string
		do   func() error
	}{
		{"Size/yzma", func() error { _, err := own.size(0); return err }},
		{"Size/kvferry", func() error { _, err := f.size(0); return err }},
		{"Save/yzma", func() error {
			if n := llama.StateSeqGetData(m.context, memory, 0); n != uint64(len(memory)) {
				return errors.New("not saved")
			}
			return nil
		}},
		{"Save/kvferry", func() error { _, err := f.llama.Sequence(0).Save(ctx, state, urgent); return err }},
		{"Save/kvferry-background", func() error { _, err := f.llama.Sequence(0).Save(ctx, state); return err }},
		{"Save/kvferry-bytes", func() error { _, err := f.llama.Sequence(0).Save(ctx, kvferry.Bytes(memory), urgent); return err }},
		{"Load/yzma", func() error { _, err := own.loadBytes(1, memory); return err }},
		{"Load/kvferry", func() error { _, err := f.llama.Sequence(1).Load(ctx, state, urgent); return err }},
	} {
		b.Run(bench.name, func(b *testing.B) {
			if bench.name[:4] != "Size" {
				b.SetBytes(int64(len(memory)))
			}
			b.ReportAllocs()
			for range b.N {
				if err := bench.do(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func quickFlags(t *testing.T) flags {
	f, err := parse([]string{"-conversations", "4", "-sequences", "2", "-turns", "10", "-prompt", "40", "-user", "5",
		"-generate", "4", "-budget", "2", "-llama-lib", testLibrary(), "-model", testModel,
		"-json", filepath.Join(t.TempDir(), "figures.json")}, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	return f
}
