package kvferry_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"example.org/kvferry"
	"example.org/kvferry/internal/llamatest"
)

// attach opens a context of the model of a kind, or of the example's model, with three sequences, and attaches to it.
func attach(tb testing.TB, kind string) (*llamatest.Context, *kvferry.Engine, *kvferry.Llama) {
	tb.Helper()
	model := llamaModel
	if kind != "" {
		model = filepath.Join(filepath.Dir(llamaModel), "go-"+kind+".gguf")
	}
	for _, needed := range []string{filepath.Join(llamaLibrary, "libllama.so"), model} {
		if _, err := os.Stat(needed); err != nil {
			if os.Getenv("KVFERRY_LLAMA_LIB") != "" {
				tb.Fatal("KVFERRY_LLAMA_LIB is set, but: ", err)
			}
			tb.Skip("needs llama.cpp (run `make go-kvcache` in the root of kvferry): ", err)
		}
	}
	llama := openModel(model)
	tb.Cleanup(llama.Close)
	engine := newEngine(tb)
	attached, err := engine.Attach(llama.Address, &llama.Lock, kvferry.AttachOptions{})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := attached.Close(); err != nil {
			tb.Error(err)
		}
	})
	return llama, engine, attached
}

func words(n int, seed uint64) []int32 {
	random := rand.New(rand.NewPCG(seed, 5))
	list := make([]int32, n)
	for i := range list {
		list[i] = random.Int32N(200)
	}
	return list
}

// cut returns the blocks from position to position, with room for each.
func cut(tb testing.TB, engine *kvferry.Engine, model *kvferry.Llama, positions ...int) []kvferry.Block {
	tb.Helper()
	var blocks []kvferry.Block
	for i, end := range positions[1:] {
		size, err := model.BlockSize(end - positions[i])
		if err != nil {
			tb.Fatal(err)
		}
		blocks = append(blocks, kvferry.Block{Memory: newBuffer(tb, engine, size), Begin: positions[i], End: end})
	}
	return blocks
}

// stateOfSequence returns what Save writes.
func stateOfSequence(tb testing.TB, sequence kvferry.Sequence) []byte {
	tb.Helper()
	size, err := sequence.Size()
	if err != nil {
		tb.Fatal(err)
	}
	state := make([]byte, size)
	if _, err := sequence.Save(context.Background(), kvferry.Bytes(state)); err != nil {
		tb.Fatal(err)
	}
	return state
}

func saveBlocks(tb testing.TB, sequence kvferry.Sequence, blocks []kvferry.Block) kvferry.Completion {
	tb.Helper()
	completion, err := sequence.SaveBlocks(context.Background(), blocks)
	if err != nil {
		tb.Fatal(err)
	}
	return completion
}

// checkpointOf saves a checkpoint where the cache needs one, else it returns nil.
func checkpointOf(tb testing.TB, sequence kvferry.Sequence, allowed kvferry.BlocksAllowed) kvferry.Memory {
	tb.Helper()
	if !allowed.NeedCheckpoint() {
		return nil
	}
	size, err := sequence.CheckpointSize()
	if err != nil {
		tb.Fatal(err)
	}
	memory := make([]byte, size)
	completion, err := sequence.SaveCheckpoint(context.Background(), kvferry.Bytes(memory))
	if err != nil {
		tb.Fatal(err)
	}
	if completion.Bytes != int64(size) || completion.Mode != kvferry.Snapshot {
		tb.Errorf("%d bytes of %d, mode %d", completion.Bytes, size, completion.Mode)
	}
	return kvferry.Bytes(memory)
}

func TestSequenceOfBlocksIsTheSequenceOfTheState(t *testing.T) {
	for kind, want := range map[string]kvferry.BlocksAllowed{
		"": kvferry.BlocksAlone, "gemma3": kvferry.BlocksWithCheckpoints, "hybrid": kvferry.BlocksWithCheckpoints,
		"mamba": kvferry.CheckpointsAlone,
	} {
		t.Run(kind, func(t *testing.T) {
			llama, engine, model := attach(t, kind)
			llama.Decode(0, words(100, 1)...)
			llama.Decode(1, words(7, 2)...) // is replaced
			allowed, reason, err := model.BlocksAllowed()
			if err != nil || allowed != want || (reason == "") != (want == kvferry.BlocksAlone) {
				t.Fatalf("allowed %d, %q, %v", allowed, reason, err)
			}
			first := model.Sequence(0)
			var blocks []kvferry.Block
			if allowed.NeedBlocks() {
				blocks = cut(t, engine, model, 0, 32, 64, 96, 100)
				completion := saveBlocks(t, first, blocks)
				var sum int
				for _, block := range blocks {
					if block.Size != block.Memory.(*kvferry.Buffer).Len() {
						t.Errorf("block of %d bytes, not %d", block.Size, block.Memory.(*kvferry.Buffer).Len())
					}
					sum += block.Size
				}
				mode := kvferry.InPlace
				if kind == "gemma3" { // sliding windows
					mode = kvferry.Snapshot
				}
				if completion.Bytes != int64(sum) || completion.Mode != mode || completion.Fragments == 0 {
					t.Errorf("%+v", completion)
				}
			}
			checkpoint := checkpointOf(t, first, allowed)
			state := stateOfSequence(t, first)

			second := model.Sequence(1)
			if _, err := second.Load(context.Background(), kvferry.Bytes(state)); err != nil {
				t.Fatal(err)
			}
			byState := stateOfSequence(t, second)
			if _, err := second.LoadBlocks(context.Background(), blocks, checkpoint, kvferry.WithPriority(kvferry.Urgent)); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(stateOfSequence(t, second), byState) {
				t.Error("the states differ")
			}
			if expected := llama.Decode(0, 5); llama.Decode(1, 5) != expected {
				t.Error("the sequence goes on in another way")
			}
		})
	}
}

func TestABlockOfPlainAttentionIsAState(t *testing.T) {
	llama, engine, model := attach(t, "")
	llama.Decode(0, words(50, 1)...)
	blocks := cut(t, engine, model, 0, 50)
	saveBlocks(t, model.Sequence(0), blocks)
	if !bytes.Equal(blocks[0].Memory.(*kvferry.Buffer).Bytes(), stateOfSequence(t, model.Sequence(0))) {
		t.Error("the states differ")
	}
}

func TestConversationsShareTheBlocksOfTheirBeginning(t *testing.T) {
	llama, engine, model := attach(t, "")
	system := words(64, 1)
	llama.Decode(0, append(slices.Clone(system), words(20, 2)...)...)
	llama.Decode(1, append(slices.Clone(system), words(9, 3)...)...)
	shared := cut(t, engine, model, 0, 32, 64)
	saveBlocks(t, model.Sequence(0), shared)
	rest := cut(t, engine, model, 64, 73)
	saveBlocks(t, model.Sequence(1), rest)
	if _, err := model.Sequence(2).LoadBlocks(context.Background(), append(shared, rest...), nil); err != nil {
		t.Fatal(err)
	}
	if expected := llama.Decode(1, 5); llama.Decode(2, 5) != expected {
		t.Error("the sequence goes on in another way")
	}
}

func TestBlocksInGoMemoryAndInParts(t *testing.T) {
	llama, engine, model := attach(t, "")
	llama.Decode(0, words(96, 1)...)
	size, err := model.BlockSize(32)
	if err != nil {
		t.Fatal(err)
	}
	one := newBuffer(t, engine, 2*size)
	blocks := []kvferry.Block{
		{Memory: kvferry.Bytes(make([]byte, size+1000)), Begin: 0, End: 32}, // has room for more
		{Memory: one.Slice(size, 2*size), Begin: 32, End: 64},
		{Memory: one.Slice(0, size), Begin: 64, End: 96},
	}
	saveBlocks(t, model.Sequence(0), blocks)
	if blocks[0].Size != size {
		t.Errorf("%d bytes, not %d", blocks[0].Size, size)
	}
	if _, err := model.Sequence(1).LoadBlocks(context.Background(), blocks, nil); err != nil {
		t.Fatal(err)
	}
	if expected := llama.Decode(0, 5); llama.Decode(1, 5) != expected {
		t.Error("the sequence goes on in another way")
	}
}

func TestEachBlockIsWholeWhenItIsToldOf(t *testing.T) {
	for _, kind := range []string{"", "gemma3", "hybrid"} {
		for _, mode := range []kvferry.SaveMode{kvferry.InPlace, kvferry.Snapshot} {
			llama, engine, model := attach(t, kind)
			llama.Decode(0, words(100, 1)...)
			expected := cut(t, engine, model, 0, 32, 64, 96, 100)
			saveBlocks(t, model.Sequence(0), expected)
			blocks := cut(t, engine, model, 0, 32, 64, 96, 100)
			told := map[int]bool{}
			completion, err := model.Sequence(0).SaveBlocks(context.Background(), blocks, kvferry.WithMode(mode),
				kvferry.EachBlock(func(i int) {
					buffer := blocks[i].Memory.(*kvferry.Buffer)
					if told[i] || !bytes.Equal(buffer.Bytes()[:blocks[i].Size], expected[i].Memory.(*kvferry.Buffer).Bytes()) {
						t.Errorf("block %d is not whole, or was told of before", i)
					}
					told[i] = true
					if err := buffer.Close(); err != nil {
						t.Error(err)
					}
				}))
			if err != nil || len(told) != len(blocks) || completion.Mode != mode {
				t.Errorf("%q: %d of %d blocks, mode %d, %v", kind, len(told), len(blocks), completion.Mode, err)
			}
		}
	}
}

// Blocks that were told of stay whole, and the rest have no call.
func TestEachBlockUnderRandomCancellation(t *testing.T) {
	llama, engine, model := attach(t, "")
	llama.Decode(0, words(250, 1)...)
	positions := []int{0}
	for p := 5; p <= 250; p += 5 {
		positions = append(positions, p)
	}
	expected := cut(t, engine, model, positions...)
	saveBlocks(t, model.Sequence(0), expected)
	blocks := cut(t, engine, model, positions...)
	random := rand.New(rand.NewPCG(1, 3))
	for round, cancelled, whole := 0, 0, 0; round < 200 || cancelled == 0 || whole == 0; round++ {
		if round == 5000 {
			t.Fatalf("%d cancelled, %d whole: the test has lost its point", cancelled, whole)
		}
		ctx, cancel := context.WithCancel(context.Background())
		last := random.IntN(2 * len(blocks))
		var told []int
		_, err := model.Sequence(0).SaveBlocks(ctx, blocks, kvferry.EachBlock(func(i int) {
			told = append(told, i)
			if len(told) > last {
				cancel()
			}
		}))
		cancel()
		switch {
		case err == nil && len(told) == len(blocks):
			whole++
		case errors.Is(err, kvferry.ErrCancelled) && errors.Is(err, context.Canceled):
			cancelled++
		default:
			t.Fatalf("%d blocks, %v", len(told), err)
		}
		slices.Sort(told)
		if len(slices.Compact(told)) != len(told) {
			t.Fatal("a block was told of twice")
		}
		for _, i := range told {
			if !bytes.Equal(blocks[i].Memory.(*kvferry.Buffer).Bytes(), expected[i].Memory.(*kvferry.Buffer).Bytes()) {
				t.Fatalf("block %d is not whole", i)
			}
		}
	}
	expectIdle(t, engine)
}

func TestPanicForABlockEndsTheTransfer(t *testing.T) {
	llama, engine, model := attach(t, "")
	llama.Decode(0, words(100, 1)...)
	blocks := cut(t, engine, model, 0, 32, 64, 96, 100)
	for range 50 {
		func() {
			defer func() {
				if recover() != "the program's" {
					t.Error("no panic")
				}
			}()
			model.Sequence(0).SaveBlocks(context.Background(), blocks, kvferry.EachBlock(func(int) { panic("the program's") }))
		}()
		expectIdle(t, engine)
		saveBlocks(t, model.Sequence(0), blocks)
	}
	for _, block := range blocks { // no call has kept a buffer
		if err := block.Memory.(*kvferry.Buffer).Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestSaveIntoTooLittleMemorySaysWhatBlocksNeed(t *testing.T) {
	llama, _, model := attach(t, "")
	llama.Decode(0, words(60, 1)...)
	blocks := []kvferry.Block{{Memory: kvferry.Bytes(make([]byte, 10)), Begin: 0, End: 32},
		{Memory: kvferry.Bytes(make([]byte, 10)), Begin: 32, End: 60}}
	if _, err := model.Sequence(0).SaveBlocks(context.Background(), blocks); !errors.Is(err, kvferry.ErrBufferTooSmall) {
		t.Fatalf("got %v", err)
	}
	for _, block := range blocks {
		size, err := model.BlockSize(block.End - block.Begin)
		if err != nil || block.Size != size {
			t.Errorf("%d bytes, not %d; %v", block.Size, size, err)
		}
	}
}

func TestRefusedBlocksCostTheSequenceNothing(t *testing.T) {
	llama, engine, model := attach(t, "")
	llama.Decode(0, words(64, 1)...)
	llama.Decode(1, words(9, 2)...)
	ctx := context.Background()
	first, second := model.Sequence(0), model.Sequence(1)
	blocks := cut(t, engine, model, 0, 32, 64)
	saveBlocks(t, first, blocks)
	damaged := blocks[0]
	damaged.Memory = kvferry.Bytes(bytes.Clone(blocks[0].Memory.(*kvferry.Buffer).Bytes()))
	damaged.Memory.(kvferry.Bytes)[0]++
	elsewhere := blocks[1]
	elsewhere.Begin, elsewhere.End = 31, 63
	long := blocks[0]
	long.Size++
	closed, err := engine.NewBuffer(100)
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	before := stateOfSequence(t, second)
	load := func(checkpoint kvferry.Memory, blocks ...kvferry.Block) func() error {
		return func() error { _, err := second.LoadBlocks(ctx, blocks, checkpoint); return err }
	}
	save := func(blocks ...kvferry.Block) func() error {
		return func() error { _, err := first.SaveBlocks(ctx, blocks); return err }
	}
	room := kvferry.Bytes(make([]byte, 1<<20))
	for name, refusal := range map[string]struct {
		do   func() error
		want error
		says string
	}{
		"no blocks":                {load(nil), kvferry.ErrInvalidArgument, ""},
		"a gap":                    {load(nil, blocks[0], kvferry.Block{Memory: blocks[1].Memory, Begin: 33, End: 65}), kvferry.ErrInvalidArgument, ""},
		"misordered blocks":        {load(nil, blocks[1], blocks[0]), kvferry.ErrInvalidArgument, ""},
		"one block twice":          {load(nil, blocks[0], blocks[0]), kvferry.ErrInvalidArgument, ""},
		"a damaged block":          {load(nil, damaged, blocks[1]), kvferry.ErrStateDamaged, ""},
		"other positions":          {load(nil, elsewhere), kvferry.ErrStateDamaged, ""},
		"a checkpoint":             {load(room, blocks...), kvferry.ErrInvalidArgument, "no checkpoints"},
		"a block past its memory":  {load(nil, blocks[0], kvferry.Block{Memory: blocks[1].Memory, Begin: 32, End: 64, Size: 1 << 30}), kvferry.ErrInvalidArgument, "block 1: Size"},
		"a negative size":          {load(nil, kvferry.Block{Memory: room, Begin: 0, End: 32, Size: -1}), kvferry.ErrInvalidArgument, "block 0: Size"},
		"an impossible position":   {load(nil, kvferry.Block{Memory: room, Begin: 0, End: 1 << 40}), kvferry.ErrInvalidArgument, "block 0: no such position"},
		"no memory":                {load(nil, kvferry.Block{Begin: 0, End: 32}), kvferry.ErrInvalidArgument, "block 0: memory is nil"},
		"a closed buffer":          {load(nil, blocks[0], kvferry.Block{Memory: closed, Begin: 32, End: 64}), kvferry.ErrInvalidArgument, "block 1: the buffer has been closed"},
		"a closed checkpoint":      {load(closed, blocks...), kvferry.ErrInvalidArgument, "closed"},
		"saving no blocks":         {save(), kvferry.ErrInvalidArgument, ""},
		"saving misordered":        {save(kvferry.Block{Memory: room[:1<<19], Begin: 32, End: 64}, kvferry.Block{Memory: room[1<<19:], Begin: 0, End: 32}), kvferry.ErrInvalidArgument, ""},
		"saving what is not there": {save(kvferry.Block{Memory: room, Begin: 64, End: 65}), kvferry.ErrSequenceEmpty, ""},
		"saving an empty sequence": {func() error { _, err := model.Sequence(2).SaveBlocks(ctx, blocks); return err }, kvferry.ErrSequenceEmpty, ""},
		"saving no such sequence":  {func() error { _, err := model.Sequence(9).SaveBlocks(ctx, blocks); return err }, kvferry.ErrSequenceRange, ""},
		"a checkpoint's size":      {func() error { _, err := first.CheckpointSize(); return err }, kvferry.ErrUnsupported, ""},
		"saving a checkpoint":      {func() error { _, err := first.SaveCheckpoint(ctx, room); return err }, kvferry.ErrUnsupported, ""},
		"a block of no tokens":     {func() error { _, err := model.BlockSize(0); return err }, kvferry.ErrInvalidArgument, ""},
		"a block of -1 tokens":     {func() error { _, err := model.BlockSize(-1); return err }, kvferry.ErrInvalidArgument, ""},
	} {
		if err := refusal.do(); !errors.Is(err, refusal.want) || !strings.Contains(err.Error(), refusal.says) {
			t.Errorf("%s gave %v", name, err)
		}
		if !bytes.Equal(stateOfSequence(t, second), before) {
			t.Fatalf("%s has changed the sequence", name)
		}
	}
	for _, block := range blocks { // no call has kept a buffer
		if err := block.Memory.(*kvferry.Buffer).Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestLoadWithoutTheCheckpointThatTheCacheNeedsIsRefused(t *testing.T) {
	llama, engine, model := attach(t, "hybrid")
	llama.Decode(0, words(64, 1)...)
	blocks := cut(t, engine, model, 0, 64)
	saveBlocks(t, model.Sequence(0), blocks)
	checkpoint := checkpointOf(t, model.Sequence(0), kvferry.BlocksWithCheckpoints)
	llama.Decode(0, 5)
	later := checkpointOf(t, model.Sequence(0), kvferry.BlocksWithCheckpoints)
	load := func(checkpoint kvferry.Memory) error {
		_, err := model.Sequence(1).LoadBlocks(context.Background(), blocks, checkpoint)
		return err
	}
	if err := load(nil); !errors.Is(err, kvferry.ErrInvalidArgument) {
		t.Errorf("without a checkpoint: %v", err)
	}
	if err := load(later); !errors.Is(err, kvferry.ErrStateDamaged) {
		t.Errorf("with a checkpoint of a later position: %v", err)
	}
	if err := load(checkpoint); err != nil {
		t.Error(err)
	}
}

func TestNothingIsKnownOfBlocksBeforeTheFirstToken(t *testing.T) {
	_, _, model := attach(t, "")
	if allowed, reason, err := model.BlocksAllowed(); err != nil || allowed != kvferry.BlocksUnseen || reason == "" {
		t.Errorf("%d, %q, %v", allowed, reason, err)
	}
	if _, err := model.BlockSize(32); !errors.Is(err, kvferry.ErrSequenceEmpty) {
		t.Errorf("got %v", err)
	}
}

func TestClosedLlamaRefusesBlocks(t *testing.T) {
	llama, engine, model := attach(t, "")
	llama.Decode(0, words(32, 1)...)
	blocks := cut(t, engine, model, 0, 32)
	if err := model.Close(); err != nil {
		t.Fatal(err)
	}
	ctx, s := context.Background(), model.Sequence(0)
	for name, call := range map[string]func() error{
		"BlocksAllowed":  func() error { _, _, err := model.BlocksAllowed(); return err },
		"BlockSize":      func() error { _, err := model.BlockSize(32); return err },
		"CheckpointSize": func() error { _, err := s.CheckpointSize(); return err },
		"SaveBlocks":     func() error { _, err := s.SaveBlocks(ctx, blocks); return err },
		"SaveCheckpoint": func() error { _, err := s.SaveCheckpoint(ctx, blocks[0].Memory); return err },
		"LoadBlocks":     func() error { _, err := s.LoadBlocks(ctx, blocks, nil); return err },
	} {
		if err := call(); !errors.Is(err, kvferry.ErrClosed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A transfer that was not cancelled moves all blocks, and a load that was cancelled leaves its sequence empty.
func TestBlocksUnderRandomCancellation(t *testing.T) {
	llama, engine, model := attach(t, "")
	llama.Decode(0, words(250, 1)...)
	first, second := model.Sequence(0), model.Sequence(1)
	empty, err := second.Size()
	if err != nil {
		t.Fatal(err)
	}
	want := stateOfSequence(t, first)
	blocks := cut(t, engine, model, 0, 64, 128, 192, 250)
	saveBlocks(t, first, blocks)
	if _, err := second.LoadBlocks(context.Background(), blocks, nil); err != nil {
		t.Fatal(err)
	}
	whole := stateOfSequence(t, second)
	random := rand.New(rand.NewPCG(1, 3))
	cancelled, moved := 0, 0
	for round := 0; round < 300 || cancelled == 0 || moved == 0; round++ {
		if round == 5000 {
			t.Fatalf("%d cancelled, %d moved: the test has lost its point", cancelled, moved)
		}
		ctx, cancel := context.WithCancel(context.Background())
		timer := time.AfterFunc(time.Duration(random.IntN(3000))*time.Microsecond, cancel)
		if _, err := first.SaveBlocks(ctx, blocks); err != nil && !errors.Is(err, kvferry.ErrCancelled) {
			t.Fatal(err)
		} else if err == nil {
			completion, err := second.LoadBlocks(ctx, blocks, nil)
			switch {
			case err == nil:
				moved++
				if !bytes.Equal(stateOfSequence(t, second), whole) {
					t.Fatal("a load is damaged")
				}
			case !errors.Is(err, kvferry.ErrCancelled) || !errors.Is(err, context.Canceled):
				t.Fatal(err)
			case completion.Submitted != 0:
				cancelled++
				if size, err := second.Size(); err != nil || size != empty {
					t.Fatalf("%d bytes are left of a cancelled load; %v", size, err)
				}
			}
		}
		timer.Stop()
		cancel()
		saveBlocks(t, first, blocks) // whatever a cancelled save has left
	}
	if !bytes.Equal(stateOfSequence(t, first), want) {
		t.Error("the sequence that was saved has changed")
	}
	expectIdle(t, engine)
	t.Logf("%d moved, %d cancelled", moved, cancelled)
}

func TestATransferOfBlocksAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	llama, engine, model := attach(t, "")
	llama.Decode(0, words(128, 1)...)
	own := cut(t, engine, model, 0, 32, 64, 96, 128)
	goMemory := []kvferry.Block{{Memory: kvferry.Bytes(make([]byte, 1<<20)), Begin: 0, End: 64},
		{Memory: kvferry.Bytes(make([]byte, 1<<20)), Begin: 64, End: 128}}
	cancellable, cancel := context.WithCancel(context.Background())
	defer cancel()
	for name, transfer := range map[string]func() error{
		"save": func() error { _, err := model.Sequence(0).SaveBlocks(context.Background(), own); return err },
		"save into Go memory": func() error {
			_, err := model.Sequence(0).SaveBlocks(context.Background(), goMemory, kvferry.WithPriority(kvferry.Urgent))
			return err
		},
		"cancellable save": func() error { _, err := model.Sequence(0).SaveBlocks(cancellable, own); return err },
		"load":             func() error { _, err := model.Sequence(1).LoadBlocks(context.Background(), own, nil); return err },
	} {
		saveBlocks(t, model.Sequence(0), own)
		expectNoAllocations(t, name, transfer)
	}
}

func TestATransferOfACheckpointAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	llama, engine, model := attach(t, "hybrid")
	llama.Decode(0, words(64, 1)...)
	blocks := cut(t, engine, model, 0, 32, 64)
	saveBlocks(t, model.Sequence(0), blocks)
	size, err := model.Sequence(0).CheckpointSize()
	if err != nil {
		t.Fatal(err)
	}
	checkpoint := &kvferry.Checkpoint{Memory: newBuffer(t, engine, size), Position: 63}
	expectNoAllocations(t, "save", func() error {
		_, err := model.Sequence(0).SaveCheckpoint(context.Background(), checkpoint)
		return err
	})
	expectNoAllocations(t, "load", func() error {
		_, err := model.Sequence(1).LoadBlocks(context.Background(), blocks, checkpoint)
		return err
	})
}

func expectNoAllocations(t *testing.T, name string, transfer func() error) {
	t.Helper()
	if n := testing.AllocsPerRun(200, func() {
		if err := transfer(); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%s: %v allocations", name, n)
	}
}
