package main

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"example.org/kvferry"
	"github.com/hybridgroup/yzma/pkg/llama"
)

// newBlocks opens a cache of blocks of 16 tokens, for a context of three sequences.
func newBlocks(t *testing.T, modelFile string, budget int64) (*model, *inBlocks) {
	t.Helper()
	m, err := openModel(modelFile, 3, 1024, 1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.close)
	engine, err := newEngine(budget)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := engine.Close(); err != nil {
			t.Error(err)
		}
	})
	mover, err := newKvferryMover(engine, m)
	if err != nil {
		t.Fatal(err)
	}
	w := newInBlocks(engine, m, mover, settings{Block: 16, Budget: budget})
	t.Cleanup(w.close)
	return m, w
}

// holdTurn holds a turn of a conversation in a sequence, without an answer. It returns how many tokens it found in the cache.
func holdTurn(t *testing.T, m *model, w *inBlocks, sequence llama.SeqId, said []llama.Token) int {
	t.Helper()
	known, err := w.begin(context.Background(), sequence, 0, said)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.feed(context.Background(), sequence, known, said[known:]); err != nil {
		t.Fatal(err)
	}
	if err := w.end(context.Background(), sequence, 0, said); err != nil {
		t.Fatal(err)
	}
	return known
}

func TestTurnSavesOnlyWhatIsNew(t *testing.T) {
	m, w := newBlocks(t, testModel, 64<<20)
	said := tokens(200, 1)
	bytesOf := func(spans ...int) (sum int64) {
		for _, tokens := range spans {
			size, err := w.mover.llama.BlockSize(tokens)
			if err != nil {
				t.Fatal(err)
			}
			sum += int64(size)
		}
		return sum
	}
	holdTurn(t, m, w, 0, said[:40])
	if want := bytesOf(16, 16, 8); w.measured.savedBytes != want {
		t.Errorf("%d bytes saved, not %d", w.measured.savedBytes, want)
	}
	if known := holdTurn(t, m, w, 1, said[:60]); known != 40 {
		t.Errorf("%d tokens found", known)
	}
	if want := bytesOf(16, 16, 8, 8, 12); w.measured.savedBytes != want {
		t.Errorf("%d bytes saved, not %d", w.measured.savedBytes, want)
	}
	if want := bytesOf(16, 16, 8); w.measured.loadedBytes != want {
		t.Errorf("%d bytes loaded, not %d", w.measured.loadedBytes, want)
	}
	// The same again: its last token is decoded, and nothing is saved.
	saved := w.measured.savedBytes
	if known := holdTurn(t, m, w, 2, said[:60]); known != 48 || w.measured.savedBytes != saved {
		t.Errorf("%d tokens found, %d bytes saved", known, w.measured.savedBytes-saved)
	}
}

func TestConversationsShareTheSystemPrompt(t *testing.T) {
	m, w := newBlocks(t, testModel, 64<<20)
	system := tokens(48, 1)
	first := append(system[:48:48], tokens(20, 2)...)
	second := append(system[:48:48], tokens(30, 3)...)
	if known := holdTurn(t, m, w, 0, first); known != 0 {
		t.Errorf("%d tokens found", known)
	}
	before := w.measured.savedBytes
	if known := holdTurn(t, m, w, 1, second); known != 48 {
		t.Errorf("%d tokens found", known)
	}
	own, err := w.mover.llama.BlockSize(30)
	if err != nil {
		t.Fatal(err)
	}
	if saved := w.measured.savedBytes - before; saved < int64(own) || saved > int64(own)+1000 {
		t.Errorf("%d bytes saved; its own tokens have %d", saved, own)
	}
}

func TestCacheThatNeedsCheckpointsGetsOneAtTheEndOfEachTurn(t *testing.T) {
	for kind, allowed := range map[string]kvferry.BlocksAllowed{"gemma3": kvferry.BlocksWithCheckpoints,
		"hybrid": kvferry.BlocksWithCheckpoints, "mamba": kvferry.CheckpointsAlone} {
		t.Run(kind, func(t *testing.T) {
			m, w := newBlocks(t, filepath.Join(filepath.Dir(testModel), "go-"+kind+".gguf"), 64<<20)
			said := tokens(100, 1)
			for i := range said {
				said[i] %= 200
			}
			holdTurn(t, m, w, 0, said[:40])
			if w.allowed != allowed {
				t.Fatalf("allowed: %d, %s", w.allowed, w.reason)
			}
			for _, turn := range []struct{ end, want int }{{60, 40}, {90, 60}, {61, 60}} {
				if known := holdTurn(t, m, w, 1, said[:turn.end]); known != turn.want {
					t.Errorf("%d tokens found, not %d", known, turn.want)
				}
			}
			result, err := checkBlocks(context.Background(), w, []conversation{{said}, {said[:70]}})
			if err != nil || result.States != 2 || result.Identical != 2 || result.SameToken != 2 {
				t.Errorf("%+v, %v", result, err)
			}
		})
	}
}

func TestProgramComparesBlocksWithWholeStates(t *testing.T) {
	f := quickFlags(t)
	f.System, f.Budget = 64, 4<<20
	var result report
	var out bytes.Buffer
	f.json = filepath.Join(t.TempDir(), "figures.json")
	if err := run(context.Background(), f, &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	readJSON(t, f.json, &result)
	whole, blocks := result.Rows[3], result.Rows[4]
	if blocks.SavedBytes*2 > whole.SavedBytes || blocks.MovedPerTurn >= whole.MovedPerTurn || blocks.Prefilled >= whole.Prefilled {
		t.Errorf("blocks: %+v\nwhole states: %+v", blocks, whole)
	}
	if blocks.KeptBytes == 0 || blocks.KeptBytes > f.Budget || whole.KeptBytes == 0 || whole.KeptBytes > f.Budget {
		t.Errorf("kept: %d in blocks, %d in states", blocks.KeptBytes, whole.KeptBytes)
	}
	if c := result.BlocksCheck; c.States == 0 || c.Identical != c.States || result.NotInBlocks != "" {
		t.Errorf("%+v, %q", c, result.NotInBlocks)
	}
	for _, word := range []string{"kvferry, blocks", "moved a turn", "kept", "prefilled", "conversations in blocks"} {
		if !strings.Contains(out.String(), word) {
			t.Errorf("the table lacks %q:\n%s", word, out.String())
		}
	}
}

func TestProgramSaysWhyBlocksAreNotEnough(t *testing.T) {
	f := quickFlags(t)
	f.model = filepath.Join(filepath.Dir(testModel), "go-hybrid.gguf")
	var out bytes.Buffer
	if err := run(context.Background(), f, &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "More than blocks is needed: ") {
		t.Errorf("it does not say why:\n%s", out.String())
	}
}

func TestEvictionsOfBlocksDoNotDependOnTheClock(t *testing.T) {
	f := quickFlags(t)
	f.Conversations, f.Sequences, f.Turns, f.System = 6, 3, 24, 32
	first := holdWith(t, f, "kvferry, blocks", func(*kvferry.Engine) {})
	if first.Evictions == 0 || first.Hits == 0 || first.Hits+first.Misses != f.Turns {
		t.Fatalf("the test has lost its point: %+v", first)
	}
	r := holdWith(t, f, "kvferry, blocks", func(*kvferry.Engine) { time.Sleep(time.Duration(rand.IntN(30)) * time.Millisecond) })
	if r.Hits != first.Hits || r.Evictions != first.Evictions || r.SavedBytes != first.SavedBytes || r.LoadedBytes != first.LoadedBytes ||
		r.KeptBytes != first.KeptBytes {
		t.Errorf("%+v\nat first:\n%+v", r, first)
	}
}

func TestSmallBudgetKeepsTheFirstBlocksOfATurn(t *testing.T) {
	const budget = 600 << 10 // three blocks of 16 tokens take 588 KiB or a little more
	m, w := newBlocks(t, testModel, budget)
	said := tokens(100, 1)
	holdTurn(t, m, w, 0, said)
	known := holdTurn(t, m, w, 1, said)
	if known == 0 || known > 48 || w.blocks.used > budget || w.blocks.counts.Refusals == 0 {
		t.Errorf("%d tokens found, %d bytes used, %+v", known, w.blocks.used, w.blocks.counts)
	}
}

// A save that is cancelled leaves no block behind.
func TestCancelledTurnKeepsNothing(t *testing.T) {
	m, w := newBlocks(t, testModel, 64<<20)
	said := tokens(100, 1)
	if _, err := m.feed(context.Background(), 0, 0, said); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := w.end(ctx, 0, 0, said); err == nil {
		t.Error("it was not cancelled")
	}
	if w.blocks.used != 0 || len(w.blocks.places) != 0 {
		t.Errorf("%d bytes in %d blocks", w.blocks.used, len(w.blocks.places))
	}
}
