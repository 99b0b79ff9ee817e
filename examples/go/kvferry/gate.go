package kvferry

import "sync/atomic"

// gate counts the users of an object. Once it is closing it refuses new users, and close waits until the last one has
// left. Unlike a sync.WaitGroup it may be entered while close waits, and unlike a sync.RWMutex entering costs one atomic
// addition.
type gate struct {
	state atomic.Int64  // the number of users, and gateClosing
	left  chan struct{} // has room for one: the last user has left a closing gate
}

const gateClosing = 1 << 62

func newGate() gate { return gate{left: make(chan struct{}, 1)} }

// enter adds a user. It returns false, and adds none, if the gate is closing or closed.
func (g *gate) enter() bool {
	if g.state.Add(1)&gateClosing != 0 {
		g.leave()
		return false
	}
	return true
}

// leave removes a user.
func (g *gate) leave() {
	if g.state.Add(-1) == gateClosing {
		select {
		case g.left <- struct{}{}:
		default: // it has been said already
		}
	}
}

// close refuses new users and waits until those inside have left. It must be called only once.
func (g *gate) close() {
	g.state.Add(gateClosing)
	for g.state.Load() != gateClosing {
		<-g.left
	}
}

// tryClose closes the gate if it has no user, and returns whether it did.
func (g *gate) tryClose() bool { return g.state.CompareAndSwap(0, gateClosing) }

// reopen reverts tryClose.
func (g *gate) reopen() { g.state.Add(-gateClosing) }

// closed returns whether the gate is closing or closed.
func (g *gate) closed() bool { return g.state.Load()&gateClosing != 0 }
