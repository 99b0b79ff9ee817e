package main

import "container/list"

// cache keeps the states of conversations within a budget of bytes, and evicts those that were used least recently. It
// must be used by one goroutine at a time.
type cache[State any] struct {
	release func(State) // frees the memory of an evicted state

	budget  int64
	used    int64
	recent  *list.List // of *entry, the most recently used first
	entries map[int]*list.Element
	counts  counts
}

type counts struct {
	Hits, Misses, Evictions, Refusals int
}

type entry[State any] struct {
	conversation int
	state        State
	tokens       int   // of the conversation that the state holds
	size         int64 // bytes of memory that the state takes
}

func newCache[State any](budget int64, release func(State)) *cache[State] {
	return &cache[State]{release: release, budget: budget, recent: list.New(), entries: map[int]*list.Element{}}
}

// take removes a conversation's state from the cache, and returns it with the number of tokens that it holds.
func (c *cache[State]) take(conversation int) (state State, tokens int, found bool) {
	element, found := c.entries[conversation]
	if !found {
		c.counts.Misses++
		return
	}
	c.counts.Hits++
	e := c.remove(element)
	return e.state, e.tokens, true
}

// makeRoom evicts states until size bytes more are within the budget. It returns false, and evicts nothing, where size
// is more than the budget.
func (c *cache[State]) makeRoom(size int64) bool {
	if size > c.budget {
		c.counts.Refusals++
		return false
	}
	for c.used+size > c.budget {
		c.counts.Evictions++
		c.release(c.remove(c.recent.Back()).state)
	}
	return true
}

// put adds a state that takes size bytes.
func (c *cache[State]) put(conversation int, state State, tokens int, size int64) {
	c.used += size
	c.entries[conversation] = c.recent.PushFront(&entry[State]{conversation, state, tokens, size})
}

// clear releases everything.
func (c *cache[State]) clear() {
	for c.recent.Len() > 0 {
		c.release(c.remove(c.recent.Back()).state)
	}
}

// each calls f with every state, the most recently used first.
func (c *cache[State]) each(f func(conversation int, state State, tokens int) error) error {
	for element := c.recent.Front(); element != nil; element = element.Next() {
		e := element.Value.(*entry[State])
		if err := f(e.conversation, e.state, e.tokens); err != nil {
			return err
		}
	}
	return nil
}

func (c *cache[State]) remove(element *list.Element) *entry[State] {
	e := c.recent.Remove(element).(*entry[State])
	delete(c.entries, e.conversation)
	c.used -= e.size
	return e
}
