package main

import (
	"slices"
	"testing"

	"github.com/hybridgroup/yzma/pkg/llama"
)

// turnsOf returns one turn for each number: a turn of the conversation with this number, whose token is its index.
func turnsOf(conversations ...int) []turn {
	turns := make([]turn, len(conversations))
	for i, conversation := range conversations {
		turns[i] = turn{conversation, []llama.Token{llama.Token(i)}}
	}
	return turns
}

func conversationsOf(line []turn) []int {
	var list []int
	for _, t := range line {
		if t.isRest() {
			list = append(list, -1)
		} else {
			list = append(list, t.conversation)
		}
	}
	return list
}

func TestConversationsNextTurnWaitsForTheOneInFlight(t *testing.T) {
	for _, c := range []struct{ turns, want []int }{
		{[]int{0, 0, 1, 2}, []int{0, 1, 0, 2}},
		{[]int{0, 0, 0}, []int{0, -1, 0, -1, 0}},
		{[]int{0, 1, 2, 0, 1}, []int{0, 1, 0, 1, 2}}, // 0 and 1 go on where they are
	} {
		if got := conversationsOf(lineUp(turnsOf(c.turns...), 2)); !slices.Equal(got, c.want) {
			t.Errorf("%v became %v, not %v", c.turns, got, c.want)
		}
	}
}

func TestEveryTurnIsLinedUpOnceInTheOrderOfItsConversation(t *testing.T) {
	s := settings{Conversations: 12, Sequences: 4, Turns: 300, Prompt: 1, User: 1, Generate: 1, Seed: 3}
	drawn := schedule(s, 100)
	turns := turnsOf(make([]int, len(drawn))...)
	for i := range drawn {
		turns[i].conversation = drawn[i].conversation
	}
	line := lineUp(turns, s.Sequences)
	last := map[int]llama.Token{}
	held, latest := 0, 0
	for place, here := range line {
		if here.isRest() {
			continue
		}
		held++
		number := here.tokens[0]
		if before, there := last[here.conversation]; there && before >= number {
			t.Fatalf("turn %d comes after %d", number, before)
		}
		last[here.conversation] = number
		latest = max(latest, place-int(number))
	}
	if held != len(turns) {
		t.Errorf("%d turns of %d", held, len(turns))
	}
	if latest > 50 { // 44 of 300, most of it for turns of the liveliest conversation
		t.Errorf("a turn is %d places late", latest)
	}
}

func TestOrderLetsThroughByNumber(t *testing.T) {
	o := newOrder()
	passed := make(chan int, 100)
	for number := range 100 {
		go func() {
			if o.enter(99 - number) {
				passed <- 99 - number
				o.leave()
			}
		}()
	}
	for number := range 100 {
		if got := <-passed; got != number {
			t.Fatalf("%d after %d", got, number-1)
		}
	}
	stopped := make(chan bool)
	go func() { stopped <- o.enter(101) }()
	o.stop()
	if <-stopped {
		t.Error("let through after the stop")
	}
}
