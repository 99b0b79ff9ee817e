package main

import (
	"container/list"
	"crypto/sha256"
	"encoding/binary"

	"github.com/hybridgroup/yzma/pkg/llama"
)

// blockKey names a run of tokens at its place: a hash of the tokens and of the key of the block before. So equal keys mean
// that everything from the conversation's first token on is equal.
type blockKey [sha256.Size]byte

// keyOf returns the key of tokens that follow the block with the key `before`, which is zero at the beginning.
func keyOf(before blockKey, tokens []llama.Token) (key blockKey) {
	hash := sha256.New()
	hash.Write(before[:])
	binary.Write(hash, binary.LittleEndian, tokens) // a hash takes everything
	hash.Sum(key[:0])
	return key
}

// block is a run of tokens that the cache keeps. Where the cache of llama.cpp needs checkpoints, the last block of a turn
// has one; where checkpoints stand alone, the block has no state.
type block[Memory any] struct {
	key, before       blockKey
	begin, end        int // positions
	state, checkpoint Memory
	hasCheckpoint     bool
	size              int64 // bytes of memory that state and checkpoint take
	held              bool  // must not be evicted now
}

// blockCache keeps the blocks of all conversations within a budget of bytes. Conversations that begin alike share the
// blocks of their beginning. It evicts the blocks that were used least recently; a block goes before the one that it
// follows. It must be used by one goroutine at a time.
type blockCache[Memory any] struct {
	release func(Memory) // frees memory of an evicted block

	budget int64
	used   int64
	recent *list.List // of *block, the most recently used first
	places map[*block[Memory]]*list.Element
	next   map[blockKey][]*block[Memory] // the blocks that follow the one with a key
	counts counts
}

func newBlockCache[Memory any](budget int64, release func(Memory)) *blockCache[Memory] {
	return &blockCache[Memory]{release: release, budget: budget, recent: list.New(),
		places: map[*block[Memory]]*list.Element{}, next: map[blockKey][]*block[Memory]{}}
}

// longest returns the blocks, one after the other, that hold the longest known prefix of tokens. The last of them is one
// that a sequence may end with.
func (c *blockCache[Memory]) longest(tokens []llama.Token, mayEnd func(*block[Memory]) bool) []*block[Memory] {
	return c.longestAfter(blockKey{}, tokens, mayEnd)
}

func (c *blockCache[Memory]) longestAfter(before blockKey, tokens []llama.Token, mayEnd func(*block[Memory]) bool) (best []*block[Memory]) {
	reached := 0
	for _, b := range c.next[before] {
		length := b.end - b.begin
		if length > len(tokens) || keyOf(before, tokens[:length]) != b.key {
			continue
		}
		rest := c.longestAfter(b.key, tokens[length:], mayEnd)
		if len(rest) == 0 && !mayEnd(b) {
			continue
		}
		found := append([]*block[Memory]{b}, rest...)
		if end := found[len(found)-1].end; end > reached {
			best, reached = found, end
		}
	}
	return best
}

// use marks blocks that follow one another as used now. The first one counts as used last, so that the last one is evicted
// first: a block is of no use without those before it.
func (c *blockCache[Memory]) use(blocks []*block[Memory]) {
	for i := len(blocks) - 1; i >= 0; i-- {
		c.recent.MoveToFront(c.places[blocks[i]])
	}
}

// makeRoom evicts blocks until size bytes more are within the budget. It returns false where that would need a block that
// is held.
func (c *blockCache[Memory]) makeRoom(size int64) bool {
	for c.used+size > c.budget {
		oldest := c.recent.Back()
		if oldest == nil || oldest.Value.(*block[Memory]).held {
			c.counts.Refusals++
			return false
		}
		c.counts.Evictions++
		c.drop(oldest.Value.(*block[Memory]))
	}
	return true
}

// put adds a block of tokens that follow the block with the key `before`. The state takes size bytes; it is a zero Memory
// where checkpoints stand alone.
func (c *blockCache[Memory]) put(before blockKey, begin int, tokens []llama.Token, state Memory, size int64) *block[Memory] {
	b := &block[Memory]{key: keyOf(before, tokens), before: before, begin: begin, end: begin + len(tokens), state: state, size: size}
	c.used += size
	c.places[b] = c.recent.PushFront(b)
	c.next[before] = append(c.next[before], b)
	return b
}

// putCheckpoint adds the checkpoint at the end of a block.
func (c *blockCache[Memory]) putCheckpoint(b *block[Memory], checkpoint Memory, size int64) {
	b.checkpoint, b.hasCheckpoint = checkpoint, true
	b.size += size
	c.used += size
}

// drop removes a block that no other block follows, and releases its memory.
func (c *blockCache[Memory]) drop(b *block[Memory]) {
	c.recent.Remove(c.places[b])
	delete(c.places, b)
	siblings := c.next[b.before]
	for i, sibling := range siblings {
		if sibling == b {
			siblings = append(siblings[:i], siblings[i+1:]...)
			break
		}
	}
	if c.next[b.before] = siblings; len(siblings) == 0 {
		delete(c.next, b.before)
	}
	c.used -= b.size
	c.release(b.state)
	if b.hasCheckpoint {
		c.release(b.checkpoint)
	}
}

// clear releases everything.
func (c *blockCache[Memory]) clear() {
	for c.recent.Len() > 0 {
		c.drop(c.recent.Back().Value.(*block[Memory]))
	}
}
