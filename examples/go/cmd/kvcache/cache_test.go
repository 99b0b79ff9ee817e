package main

import (
	"slices"
	"testing"
)

func TestLeastRecentlyUsedGoesFirst(t *testing.T) {
	var gone []string
	c := newCache(100, func(state string) { gone = append(gone, state) })
	for i, state := range []string{"a", "b", "c"} {
		if !c.makeRoom(30) {
			t.Fatal("no room")
		}
		c.put(i, state, 1, 30)
	}
	// "a" is used again, so "b" is the oldest.
	state, _, found := c.take(0)
	if !found || state != "a" {
		t.Fatal("a is not there")
	}
	c.put(0, state, 1, 30)
	if !c.makeRoom(35) {
		t.Fatal("no room")
	}
	if !slices.Equal(gone, []string{"b"}) || c.used != 60 {
		t.Errorf("gone: %v; %d bytes used", gone, c.used)
	}
	if _, _, found := c.take(1); found {
		t.Error("b is still there")
	}
}

func TestStateLargerThanTheBudgetIsRefusedAndCostsNoOther(t *testing.T) {
	c := newCache(100, func(string) { t.Error("something was evicted") })
	c.makeRoom(60)
	c.put(0, "a", 1, 60)
	if c.makeRoom(101) || c.used != 60 || c.counts.Refusals != 1 {
		t.Errorf("used %d, %+v", c.used, c.counts)
	}
}
