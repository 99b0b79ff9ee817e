package main

import (
	"slices"
	"testing"

	"github.com/hybridgroup/yzma/pkg/llama"
)

// putAll puts tokens into the cache in blocks of the given lengths, whose states are named after their ends and take ten
// bytes, and returns the blocks.
func putAll(c *blockCache[string], tokens []llama.Token, name string, lengths ...int) (blocks []*block[string]) {
	begin, before := 0, blockKey{}
	for _, length := range lengths {
		b := c.put(before, begin, tokens[begin:begin+length], name, 10)
		blocks = append(blocks, b)
		begin, before = b.end, b.key
	}
	return blocks
}

func anyEnd(*block[string]) bool { return true }

func endOf(blocks []*block[string]) int {
	if len(blocks) == 0 {
		return 0
	}
	return blocks[len(blocks)-1].end
}

func TestLongestKnownPrefixIsFound(t *testing.T) {
	c := newBlockCache(1000, func(string) {})
	said := tokens(100, 1)
	putAll(c, said, "a", 16, 16, 8)
	other := slices.Concat(said[:32], tokens(20, 2))
	for _, test := range []struct {
		tokens []llama.Token
		want   int
	}{
		{said, 40}, {said[:40], 40}, {said[:39], 32}, {said[:15], 0}, {nil, 0}, {other, 32}, {said[16:], 0},
	} {
		if got := endOf(c.longest(test.tokens, anyEnd)); got != test.want {
			t.Errorf("%d of %d tokens found, not %d", got, len(test.tokens), test.want)
		}
	}
}

func TestLongestPrefixTakesTheCutThatReachesFurthest(t *testing.T) {
	c := newBlockCache(1000, func(string) {})
	said := tokens(64, 1)
	putAll(c, said, "long at first", 16)
	putAll(c, said, "longer in the end", 10, 6, 16)
	found := c.longest(said, anyEnd)
	if len(found) != 3 || endOf(found) != 32 {
		t.Errorf("%d blocks up to %d", len(found), endOf(found))
	}
}

func TestSequenceEndsOnlyWhereItMay(t *testing.T) {
	c := newBlockCache(1000, func(string) {})
	said := tokens(64, 1)
	blocks := putAll(c, said, "a", 16, 16, 16)
	withCheckpoint := func(b *block[string]) bool { return b.hasCheckpoint }
	if found := c.longest(said, withCheckpoint); len(found) != 0 {
		t.Errorf("%d blocks", len(found))
	}
	c.putCheckpoint(blocks[1], "checkpoint", 5)
	if found := c.longest(said, withCheckpoint); !slices.Equal(found, blocks[:2]) {
		t.Errorf("%d blocks", len(found))
	}
	if c.used != 35 {
		t.Errorf("%d bytes used", c.used)
	}
}

func TestBlockIsEvictedBeforeTheOneThatItFollows(t *testing.T) {
	var gone []string
	c := newBlockCache(60, func(state string) { gone = append(gone, state) })
	said := tokens(100, 1)
	put := func(name string, own uint64) {
		all := slices.Concat(said[:16], tokens(32, own))
		begin := endOf(c.longest(all, anyEnd))
		if begin == 0 {
			putAll(c, all, "shared", 16)
		}
		first := c.put(keyOf(blockKey{}, all[:16]), 16, all[16:32], name+"1", 10)
		c.put(first.key, 32, all[32:], name+"2", 10)
		c.use(c.longest(all, anyEnd))
	}
	put("a", 2)
	put("b", 3)
	if !c.makeRoom(40) {
		t.Fatal("no room")
	}
	if !slices.Equal(gone, []string{"a2", "a1", "b2"}) || c.used != 20 || c.counts.Evictions != 3 {
		t.Errorf("gone: %v; %d bytes used", gone, c.used)
	}
	c.clear()
	if !slices.Equal(gone[3:], []string{"b1", "shared"}) || c.used != 0 || len(c.next) != 0 || len(c.places) != 0 {
		t.Errorf("gone: %v; %d bytes used", gone, c.used)
	}
}

func TestHeldBlocksAreNotEvicted(t *testing.T) {
	c := newBlockCache(30, func(string) { t.Error("something was evicted") })
	hold := putAll(c, tokens(48, 1), "a", 16, 16, 16)
	for _, b := range hold {
		b.held = true
	}
	if c.makeRoom(1) || c.counts.Refusals != 1 || c.used != 30 {
		t.Errorf("used %d, %+v", c.used, c.counts)
	}
}

func TestEvictedBlockReleasesItsCheckpoint(t *testing.T) {
	var gone []string
	c := newBlockCache(100, func(state string) { gone = append(gone, state) })
	blocks := putAll(c, tokens(16, 1), "state", 16)
	c.putCheckpoint(blocks[0], "checkpoint", 10)
	c.clear()
	if !slices.Equal(gone, []string{"state", "checkpoint"}) || c.used != 0 {
		t.Errorf("gone: %v; %d bytes used", gone, c.used)
	}
}
