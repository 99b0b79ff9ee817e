package main

import (
	"context"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/hybridgroup/yzma/pkg/llama"
)

// settings say what the conversations are like.
type settings struct {
	Conversations int    `json:"conversations"`
	Sequences     int    `json:"sequences"`
	Turns         int    `json:"turns"`    // of all conversations together
	System        int    `json:"system"`   // tokens that all conversations begin with
	Prompt        int    `json:"prompt"`   // tokens that follow them in the first turn, on average
	User          int    `json:"user"`     // tokens of a later turn
	Generate      int    `json:"generate"` // tokens of an answer
	Block         int    `json:"block"`    // tokens of a block, at most
	Budget        int64  `json:"budget_bytes"`
	Seed          uint64 `json:"seed"`
}

// conversation is what the user and the model have said.
type conversation struct {
	tokens []llama.Token
}

// turn is what a user says next in a conversation. Without tokens it is a rest: the sequence has nothing to do.
type turn struct {
	conversation int
	tokens       []llama.Token
}

func (t turn) isRest() bool { return len(t.tokens) == 0 }

// schedule draws the turns at random, the same for every way. Some conversations have more turns than others, by Zipf's
// law.
func schedule(s settings, vocabulary int) []turn {
	random := rand.New(rand.NewPCG(s.Seed, 1))
	weights, total := make([]float64, s.Conversations), 0.0
	for i := range weights {
		weights[i] = 1 / math.Pow(float64(i+1), 0.8)
		total += weights[i]
	}
	system := randomTokens(rand.New(rand.NewPCG(s.Seed, 2)), s.System, vocabulary)
	begun := make([]bool, s.Conversations)
	turns := make([]turn, s.Turns)
	for i := range turns {
		at, n := random.Float64()*total, 0
		for n < s.Conversations-1 && at >= weights[n] {
			at -= weights[n]
			n++
		}
		length := s.User
		var said []llama.Token
		if !begun[n] {
			begun[n] = true
			length = s.Prompt/2 + random.IntN(s.Prompt+1)
			said = system
		}
		turns[i] = turn{n, slices.Concat(said, randomTokens(random, max(1, length), vocabulary))}
	}
	return turns
}

func randomTokens(random *rand.Rand, count, vocabulary int) []llama.Token {
	tokens := make([]llama.Token, count)
	for i := range tokens {
		tokens[i] = llama.Token(random.IntN(vocabulary))
	}
	return tokens
}

// lineUp puts the turns into the order in which they are held: turn i in sequence i % sequences, when the turn before it in
// the same sequence has ended. So no conversation may come twice among `sequences` neighbours. Its next turn waits then,
// and later turns go first.
//
// A server prefers to hold the next turn of a conversation in the sequence where the conversation still is. So such a
// turn goes first too, unless others have gone before the first waiting turn `sequences` times already.
func lineUp(turns []turn, sequences int) []turn {
	pending := slices.Clone(turns)
	var line []turn
	overtaken := 0 // how often others have gone before the first turn in pending
	for len(pending) > 0 {
		inFlight := line[max(0, len(line)-sequences+1):]
		inPlace := -1
		if len(line) >= sequences && !line[len(line)-sequences].isRest() {
			inPlace = line[len(line)-sequences].conversation
		}
		next := -1
		for i, t := range pending {
			busy := slices.ContainsFunc(inFlight, func(o turn) bool { return !o.isRest() && o.conversation == t.conversation })
			if busy || slices.ContainsFunc(pending[:i], func(o turn) bool { return o.conversation == t.conversation }) {
				continue
			}
			if next < 0 {
				next = i
			}
			if t.conversation == inPlace && overtaken < sequences {
				next = i
				break
			}
		}
		if next < 0 {
			line = append(line, turn{})
			continue
		}
		if overtaken++; next == 0 {
			overtaken = 0
		}
		line = append(line, pending[next])
		pending = slices.Delete(pending, next, next+1)
	}
	return line
}

// longest returns the number of tokens that a sequence must have room for.
func longest(s settings, turns []turn) int {
	lengths, most := make([]int, s.Conversations), 0
	for _, t := range turns {
		lengths[t.conversation] += len(t.tokens) + s.Generate
		most = max(most, lengths[t.conversation])
	}
	return most
}

// runner holds conversations: as many turns at a time as there are sequences, each in one of its own.
type runner struct {
	settings settings
	model    *model
	decoder  *decoder
	way      way
	progress func(done int)

	order         *order
	conversations []conversation

	mutex   sync.Mutex
	done    int
	failed  error
	figures figures
}

// figures is what a run measures, in addition to the figures of its way.
type figures struct {
	firsts, found []time.Duration // until the first token: of all turns, and of those after a hit
	prefilled     int
}

func (r *runner) run(ctx context.Context, turns []turn) error {
	r.order = newOrder()
	r.conversations = make([]conversation, r.settings.Conversations)
	line := lineUp(turns, r.settings.Sequences)
	defer context.AfterFunc(ctx, func() { r.fail(context.Cause(ctx)) })()
	var group sync.WaitGroup
	for sequence := range r.settings.Sequences {
		group.Go(func() {
			if err := r.serve(ctx, llama.SeqId(sequence), line); err != nil {
				r.fail(err)
			}
		})
	}
	group.Wait()
	r.mutex.Lock()
	defer r.mutex.Unlock()
	return r.failed
}

// serve holds the turns of one sequence. Between two turns it saves the conversation of the last one and loads that of the
// next one. All sequences do that one after the other, in the order of the turns and not in the order in which the turns
// happen to end. So hits and evictions do not depend on the clock.
func (r *runner) serve(ctx context.Context, sequence llama.SeqId, line []turn) error {
	var last turn
	for i := int(sequence); i-r.settings.Sequences < len(line); i += r.settings.Sequences {
		var next turn
		if i < len(line) {
			next = line[i]
		}
		if !r.order.enter(i) {
			return nil
		}
		start, known, err := r.change(ctx, sequence, last, next)
		r.order.leave()
		if err != nil {
			return err
		}
		if !next.isRest() {
			if err := r.turn(ctx, sequence, next, known, start); err != nil {
				return err
			}
		}
		last = next
	}
	return nil
}

// change ends the last turn and begins the next one. It returns when the next turn began, and how many tokens of its
// conversation the sequence holds.
func (r *runner) change(ctx context.Context, sequence llama.SeqId, last, next turn) (start time.Time, known int, err error) {
	if !last.isRest() {
		said := r.conversations[last.conversation].tokens
		err = r.way.end(ctx, sequence, last.conversation, said[:len(said)-1]) // the last token that was generated is not in it
	}
	start = time.Now()
	if err == nil && !next.isRest() {
		said := slices.Concat(r.conversations[next.conversation].tokens, next.tokens)
		known, err = r.way.begin(ctx, sequence, next.conversation, said)
	}
	return start, known, err
}

// turn decodes what the user says, and generates the answer.
func (r *runner) turn(ctx context.Context, sequence llama.SeqId, t turn, known int, start time.Time) error {
	c := &r.conversations[t.conversation]
	tokens := append(c.tokens, t.tokens...)
	w := r.decoder.decode(ctx, sequence, known, tokens[known:], r.settings.Generate)
	if w.err != nil {
		return w.err
	}
	c.tokens = append(tokens, w.generated...)
	r.mutex.Lock()
	defer r.mutex.Unlock()
	r.figures.firsts = append(r.figures.firsts, w.first.Sub(start))
	if known > 0 {
		r.figures.found = append(r.figures.found, w.first.Sub(start))
	}
	r.figures.prefilled += len(tokens) - known
	r.done++
	r.progress(r.done)
	return nil
}

func (r *runner) fail(err error) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	if r.failed == nil {
		r.failed = err
	}
	r.order.stop()
}
