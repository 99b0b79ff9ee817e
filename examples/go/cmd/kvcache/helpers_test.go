package main

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/hybridgroup/yzma/pkg/llama"

	"example.org/kvferry"
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

// newModel opens the model, attaches an engine, and decodes `length` tokens into each of the `filled` sequences.
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

func quickFlags(t *testing.T) flags {
	f, err := parse([]string{"-conversations", "4", "-sequences", "2", "-turns", "10", "-system", "0", "-prompt", "40", "-block", "16", "-user", "5",
		"-generate", "4", "-budget", "2", "-llama-lib", testLibrary(), "-model", testModel,
		"-json", filepath.Join(t.TempDir(), "figures.json")}, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	return f
}
