package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/hybridgroup/yzma/pkg/llama"
)

// model is a llama.cpp model with one context of several sequences, each with a cache of its own.
type model struct {
	// Guards the context: it is held around every use of it, and kvferry takes it too.
	mutex sync.Mutex

	handle     llama.Model
	context    llama.Context
	memory     llama.Memory
	vocabulary int
	sequences  int
	batch      int // most tokens of a step
}

// loadLibrary loads libllama from a folder, once per process, and keeps it quiet.
func loadLibrary(folder string) error {
	folder, err := filepath.Abs(folder)
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(folder, "libllama.so")); err != nil {
		return fmt.Errorf("no libllama (run `make go-kvcache` in the root of kvferry, or give -llama-lib): %w", err)
	}
	if err := llama.Load(folder); err != nil {
		return err
	}
	llama.LogSet(llama.LogSilent())
	llama.Init()
	return nil
}

func openModel(path string, sequences, contextLength, threads int) (*model, error) {
	if _, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("no model (run `make go-kvcache` in the root of kvferry, or give -model): %w", err)
	}
	handle, err := llama.ModelLoadFromFile(path, llama.ModelDefaultParams())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	m := &model{handle: handle, sequences: sequences, batch: 512}
	params := llama.ContextDefaultParams()
	params.NSeqMax = uint32(sequences)
	params.NCtx = uint32(sequences * contextLength)
	params.NBatch, params.NUbatch = uint32(m.batch), uint32(m.batch)
	params.NThreads, params.NThreadsBatch = int32(threads), int32(threads)
	params.KVUnified = 0
	if m.context, err = llama.InitFromModel(handle, params); err != nil {
		llama.ModelFree(handle)
		return nil, err
	}
	if m.memory, err = llama.GetMemory(m.context); err != nil {
		m.close()
		return nil, err
	}
	m.vocabulary = int(llama.VocabNTokens(llama.ModelGetVocab(handle)))
	return m, nil
}

func (m *model) close() {
	llama.Free(m.context)
	llama.ModelFree(m.handle)
}

// clear empties a sequence.
func (m *model) clear(sequence llama.SeqId) {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	llama.MemorySeqRm(m.memory, sequence, -1, -1)
}

// decode runs a batch. The lock must be held, and until the logits have been read.
func (m *model) decode(batch llama.Batch) error {
	status, err := llama.Decode(m.context, batch)
	if err != nil {
		return err
	}
	if status != 0 {
		return fmt.Errorf("llama_decode answered %d", status)
	}
	return nil
}

// logits gives the logits that belong to a token of the last batch. They are overwritten by the next one.
func (m *model) logits(index int32) ([]float32, error) {
	logits, err := llama.GetLogitsIth(m.context, index, m.vocabulary)
	if err == nil && logits == nil {
		err = errors.New("the token has no logits")
	}
	return logits, err
}

func largest(logits []float32) llama.Token {
	best := 0
	for i, value := range logits {
		if value > logits[best] {
			best = i
		}
	}
	return llama.Token(best)
}
