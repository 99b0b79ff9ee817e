package main

import "sync"

// order admits goroutines one at a time, in the order of their numbers: 0, 1, 2 and so on.
type order struct {
	mutex   sync.Mutex
	changed *sync.Cond
	next    int
	stopped bool
}

func newOrder() *order {
	o := &order{}
	o.changed = sync.NewCond(&o.mutex)
	return o
}

// enter waits until all numbers before this one have left. It returns false after stop.
func (o *order) enter(number int) bool {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	for o.next != number && !o.stopped {
		o.changed.Wait()
	}
	return !o.stopped
}

func (o *order) leave() {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	o.next++
	o.changed.Broadcast()
}

// stop admits nobody any more.
func (o *order) stop() {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	o.stopped = true
	o.changed.Broadcast()
}
