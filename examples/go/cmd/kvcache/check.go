package main

import (
	"bytes"
	"context"
	"math"
	"slices"

	"example.org/kvferry"
	"github.com/hybridgroup/yzma/pkg/llama"
)

// checked says what the comparison of the states that the run has left in the cache has found.
type checked struct {
	States int `json:"states"`
	// Identical counts the states for which kvferry's load is the same as llama.cpp's own: the same bytes when the
	// sequence is saved again, with either, and the same logits of the next token, bit for bit.
	Identical int `json:"identical_to_llama_cpp"`
	// SameToken counts the states after which the most likely token is the one that follows when the whole conversation
	// is prefilled again. The logits themselves differ a little: in the run they were computed in batches with tokens of
	// other conversations.
	SameToken   int     `json:"same_next_token_as_prefill"`
	LargestDiff float64 `json:"largest_logit_difference_to_prefill"` // relative to the largest logit
}

// check compares every state in the cache, in a context that does nothing else.
func check(ctx context.Context, m *model, k kvferryMover, states *cache[*kvferry.Buffer], conversations []conversation) (checked, error) {
	var result checked
	c := checker{ctx, m, k, llamaMover{m}}
	err := states.each(func(conversation int, state *kvferry.Buffer, tokens int) error {
		said := conversations[conversation].tokens
		load := func() error { _, err := k.load(ctx, checkedSequence, state); return err }
		return c.compare(&result, load, state.Bytes(), said[:tokens], said[tokens])
	})
	m.clear(checkedSequence)
	return result, err
}

// checkBlocks compares what blocks hold of every conversation. llama.cpp loads the state that it has written of the sequence
// that kvferry has loaded from blocks.
func checkBlocks(ctx context.Context, w *inBlocks, conversations []conversation) (checked, error) {
	var result checked
	c := checker{ctx, w.model, w.mover, llamaMover{w.model}}
	defer w.model.clear(checkedSequence)
	for _, conversation := range conversations {
		if len(conversation.tokens) == 0 {
			continue
		}
		found := w.find(conversation.tokens)
		if len(found) == 0 {
			continue
		}
		tokens := found[len(found)-1].end
		load := func() error { _, _, err := w.load(ctx, checkedSequence, found); return err }
		if err := c.compare(&result, load, nil, conversation.tokens[:tokens], conversation.tokens[tokens]); err != nil {
			return result, err
		}
	}
	return result, nil
}

// checkedSequence is the sequence that states are loaded into to be compared.
const checkedSequence = 0

type checker struct {
	ctx       context.Context
	model     *model
	byKvferry kvferryMover
	byLlama   llamaMover
}

// compare makes the sequence of the tokens that were said in each of three ways, and decodes the next token after each: by
// kvferry's load, by llama.cpp's load of the state, and by prefilling. Without a state it takes the one that llama.cpp writes
// after kvferry's load.
func (c checker) compare(result *checked, load func() error, state []byte, said []llama.Token, next llama.Token) error {
	again, byLlama, loaded, err := c.afterKvferrysLoad(load, len(said), next)
	if err != nil {
		return err
	}
	if state == nil {
		state = byLlama
	}
	// kvferry's states of a cache whose format it does not know end with a checksum, which llama.cpp does not take.
	size := len(byLlama)
	reference, expected, err := c.afterLlamasLoad(state[:size], len(said), next)
	if err != nil {
		return err
	}
	prefilled, err := c.afterPrefill(said, next)
	if err != nil {
		return err
	}

	result.States++
	if bytes.Equal(again[:size], reference) && bytes.Equal(byLlama, reference) && sameBits(loaded, expected) {
		result.Identical++
	}
	if largest(loaded) == largest(prefilled) {
		result.SameToken++
	}
	result.LargestDiff = max(result.LargestDiff, largestDifference(loaded, prefilled))
	return nil
}

// afterKvferrysLoad returns the state as kvferry and llama.cpp save it again, and the logits after the next token. The
// states go to memory of Go's, because the engine's memory is the cache's.
func (c checker) afterKvferrysLoad(load func() error, position int, next llama.Token) (again, byLlama []byte, logits []float32, err error) {
	c.model.clear(checkedSequence)
	if err = load(); err != nil {
		return
	}
	ours, err := c.byKvferry.size(checkedSequence)
	if err != nil {
		return
	}
	size, err := c.byLlama.size(checkedSequence)
	if err != nil {
		return
	}
	again, byLlama = make([]byte, ours), make([]byte, size)
	if _, err = c.byKvferry.llama.Sequence(checkedSequence).Save(c.ctx, kvferry.Bytes(again)); err != nil {
		return
	}
	if _, err = c.byLlama.saveBytes(checkedSequence, byLlama); err != nil {
		return
	}
	logits, err = c.model.feed(c.ctx, checkedSequence, position, []llama.Token{next})
	return
}

// afterLlamasLoad returns the state as llama.cpp saves it again, and the logits after the next token.
func (c checker) afterLlamasLoad(state []byte, position int, next llama.Token) (again []byte, logits []float32, err error) {
	c.model.clear(checkedSequence)
	if _, err = c.byLlama.loadBytes(checkedSequence, state); err != nil {
		return
	}
	again = make([]byte, len(state))
	if _, err = c.byLlama.saveBytes(checkedSequence, again); err != nil {
		return
	}
	logits, err = c.model.feed(c.ctx, checkedSequence, position, []llama.Token{next})
	return
}

// afterPrefill returns the logits after the next token, with the whole conversation decoded again.
func (c checker) afterPrefill(said []llama.Token, next llama.Token) ([]float32, error) {
	c.model.clear(checkedSequence)
	if _, err := c.model.feed(c.ctx, checkedSequence, 0, said); err != nil {
		return nil, err
	}
	return c.model.feed(c.ctx, checkedSequence, len(said), []llama.Token{next})
}

func sameBits(a, b []float32) bool {
	return slices.EqualFunc(a, b, func(x, y float32) bool { return math.Float32bits(x) == math.Float32bits(y) })
}

// largestDifference returns the largest difference to a logit of the reference, relative to the reference's largest.
func largestDifference(logits, reference []float32) float64 {
	var scale, most float64
	for _, value := range reference {
		scale = max(scale, math.Abs(float64(value)))
	}
	for i := range logits {
		most = max(most, math.Abs(float64(logits[i]-reference[i])/scale))
	}
	return most
}
