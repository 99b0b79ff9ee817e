package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/hybridgroup/yzma/pkg/llama"
)

// model is a llama.cpp model with one context of several sequences, each with a cache of its own.
type model struct {
	// Held around everything that is done with the context. kvferry takes it too.
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

// decode runs a batch. The caller holds the lock, until it has read the logits.
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

// logits returns the logits of a token of the last batch. The next batch overwrites them.
func (m *model) logits(index int32) ([]float32, error) {
	logits, err := llama.GetLogitsIth(m.context, index, m.vocabulary)
	if err == nil && logits == nil {
		err = errors.New("the token has no logits")
	}
	return logits, err
}

// feed decodes tokens of one sequence, from a position on, and returns a copy of the last one's logits. It takes the lock.
func (m *model) feed(ctx context.Context, sequence llama.SeqId, position int, tokens []llama.Token) ([]float32, error) {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	batch := llama.BatchInit(int32(m.batch), 0, 1)
	defer llama.BatchFree(batch)
	for first := 0; first < len(tokens); first += m.batch {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		batch.Clear()
		for i := first; i < min(first+m.batch, len(tokens)); i++ {
			if err := batch.Add(tokens[i], llama.Pos(position+i), []llama.SeqId{sequence}, i == len(tokens)-1); err != nil {
				return nil, err
			}
		}
		if err := m.decode(batch); err != nil {
			return nil, err
		}
	}
	logits, err := m.logits(batch.NTokens - 1)
	return slices.Clone(logits), err
}

// largest returns the token with the largest logit.
func largest(logits []float32) llama.Token {
	best := 0
	for i, value := range logits {
		if value > logits[best] {
			best = i
		}
	}
	return llama.Token(best)
}
