package kvferry

import "sync/atomic"

// gate counts who is inside, lets nobody in once it is closing, and lets the closer wait until it is empty. Unlike
// a sync.WaitGroup it may be entered while somebody waits, and unlike a sync.RWMutex it costs one atomic addition.
type gate struct {
	state atomic.Int64 // who is inside, and gateClosing
	left  chan struct{}
}

const gateClosing = 1 << 62

func newGate() gate { return gate{left: make(chan struct{}, 1)} }

func (g *gate) enter() bool {
	if g.state.Add(1)&gateClosing != 0 {
		g.leave()
		return false
	}
	return true
}

func (g *gate) leave() {
	if g.state.Add(-1) == gateClosing {
		select {
		case g.left <- struct{}{}:
		default: // somebody has said so already
		}
	}
}

// close lets nobody in any more and waits for those inside. Must be called once.
func (g *gate) close() {
	g.state.Add(gateClosing)
	for g.state.Load() != gateClosing {
		<-g.left
	}
}

// tryClose closes an empty gate. False where somebody is inside.
func (g *gate) tryClose() bool { return g.state.CompareAndSwap(0, gateClosing) }

// reopen takes tryClose back.
func (g *gate) reopen() { g.state.Add(-gateClosing) }

func (g *gate) closed() bool { return g.state.Load()&gateClosing != 0 }
