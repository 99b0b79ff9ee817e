package main

import (
	"container/list"
	"sync"
)

// cache keeps the states of conversations within a budget of bytes. Who wants to store a state says its size first:
// then the least recently used ones go, and only if there is room the bytes are written. A state enters the cache when
// it is whole, so that nobody ever finds half of one.
type cache[State any] struct {
	release func(State) // gives the memory of an evicted state back

	mutex   sync.Mutex
	budget  int64
	used    int64      // of states, and of room promised to states that are being written
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
	tokens       int // of the conversation that the state holds
	size         int64
}

func newCache[State any](budget int64, release func(State)) *cache[State] {
	return &cache[State]{release: release, budget: budget, recent: list.New(), entries: map[int]*list.Element{}}
}

// take takes a conversation's state out of the cache, so that nobody evicts it while it is being loaded. Its bytes
// still count, until giveUp.
func (c *cache[State]) take(conversation int) (state State, tokens int, size int64, found bool) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	element, found := c.entries[conversation]
	if !found {
		c.counts.Misses++
		return
	}
	c.counts.Hits++
	e := c.remove(element)
	return e.state, e.tokens, e.size, true
}

// reserve makes room for size bytes, at the cost of the least recently used. False where there is none to be made.
func (c *cache[State]) reserve(size int64) bool {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	for c.used+size > c.budget {
		oldest := c.recent.Back()
		if oldest == nil {
			c.counts.Refusals++
			return false
		}
		e := c.remove(oldest)
		c.used -= e.size
		c.counts.Evictions++
		c.release(e.state)
	}
	c.used += size
	return true
}

// giveUp gives back room that was reserved, or that a taken state occupied.
func (c *cache[State]) giveUp(size int64) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.used -= size
}

// put enters a whole state, for which room was reserved.
func (c *cache[State]) put(conversation int, state State, tokens int, size int64) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.entries[conversation] = c.recent.PushFront(&entry[State]{conversation, state, tokens, size})
}

// clear releases everything.
func (c *cache[State]) clear() {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	for c.recent.Len() > 0 {
		e := c.remove(c.recent.Back())
		c.used -= e.size
		c.release(e.state)
	}
}

// each calls f with every state, the most recently used first.
func (c *cache[State]) each(f func(conversation int, state State, tokens int) error) error {
	c.mutex.Lock()
	defer c.mutex.Unlock()
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
	return e
}
