package main

import (
	"bytes"
	"context"
	"math"
	"slices"

	"example.org/kvferry"
	"github.com/hybridgroup/yzma/pkg/llama"
)

// checked says how states that the run has left in the cache stand the comparison.
type checked struct {
	States int `json:"states"`
	// What kvferry has loaded is what llama.cpp's own call loads: the same bytes when it is saved again, by either,
	// and the same logits of the next token, bit for bit.
	Identical int `json:"identical_to_llama_cpp"`
	// The next token is the one that follows when the whole conversation is prefilled again. The logits themselves
	// differ a little: in the run its tokens were computed in batches with those of others.
	SameToken   int     `json:"same_next_token_as_prefill"`
	LargestDiff float64 `json:"largest_logit_difference_to_prefill"` // of the largest logit
}

// check loads every state that is in the cache in each of three ways into a context that does nothing else. What it saves
// goes to memory of Go's: the engine's is the cache's.
func check(ctx context.Context, m *model, f ferry, states *cache[*kvferry.Buffer], conversations []conversation) (checked, error) {
	var result checked
	const sequence = 0
	own := plain{m}
	err := states.each(func(conversation int, state *kvferry.Buffer, tokens int) error {
		said := conversations[conversation].tokens
		next := said[tokens]

		m.clear(sequence)
		if _, err := f.load(ctx, sequence, state); err != nil {
			return err
		}
		// kvferry's states of a cache whose format is not known end with an envelope, which llama.cpp does not take.
		size, err := own.size(sequence)
		if err != nil {
			return err
		}
		again, byLlama, reference := make([]byte, state.Len()), make([]byte, size), make([]byte, size)
		if _, err := f.llama.Sequence(sequence).Save(ctx, kvferry.Bytes(again)); err != nil {
			return err
		}
		if _, err := own.saveBytes(sequence, byLlama); err != nil {
			return err
		}
		ferried, err := m.feed(ctx, sequence, tokens, []llama.Token{next})
		if err != nil {
			return err
		}

		m.clear(sequence)
		if _, err := own.loadBytes(sequence, state.Bytes()[:size]); err != nil {
			return err
		}
		if _, err := own.saveBytes(sequence, reference); err != nil {
			return err
		}
		loaded, err := m.feed(ctx, sequence, tokens, []llama.Token{next})
		if err != nil {
			return err
		}
		same := bytes.Equal(again[:size], reference) && bytes.Equal(byLlama, reference) && sameBits(ferried, loaded)

		m.clear(sequence)
		if _, err = m.feed(ctx, sequence, 0, said[:tokens]); err != nil {
			return err
		}
		prefilled, err := m.feed(ctx, sequence, tokens, []llama.Token{next})
		if err != nil {
			return err
		}

		result.States++
		if same {
			result.Identical++
		}
		if largest(ferried) == largest(prefilled) {
			result.SameToken++
		}
		var scale float64
		for _, value := range prefilled {
			scale = max(scale, math.Abs(float64(value)))
		}
		for i := range ferried {
			result.LargestDiff = max(result.LargestDiff, math.Abs(float64(ferried[i]-prefilled[i])/scale))
		}
		return nil
	})
	m.clear(sequence)
	return result, err
}

func sameBits(a, b []float32) bool {
	return slices.EqualFunc(a, b, func(x, y float32) bool { return math.Float32bits(x) == math.Float32bits(y) })
}

// feed decodes tokens of one sequence, and gives a copy of the last one's logits.
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
