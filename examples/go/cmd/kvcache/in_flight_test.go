package main

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/hybridgroup/yzma/pkg/llama"

	"example.org/kvferry"
)

// Sequences are saved and loaded while another one decodes without a pause, and many of the transfers are cancelled. A
// transfer that was not cancelled moves the whole state, and a load that was cancelled leaves its sequence empty.
func TestSequencesUnderRandomCancellation(t *testing.T) {
	const sequences, rounds, length = 4, 100, 120
	m, f := newModel(t, sequences, length, 0, 1, 2, 3)
	stop := make(chan struct{})
	var decoding, moving sync.WaitGroup
	decoding.Go(func() {
		for position := length; ; position++ {
			select {
			case <-stop:
				return
			default:
			}
			if position == 1000 {
				m.clear(0)
				position = 0
			}
			if _, err := m.feed(context.Background(), 0, position, tokens(1, uint64(position))); err != nil {
				t.Error(err)
				return
			}
		}
	})
	var mutex sync.Mutex
	cancelled, whole := 0, 0
	for sequence := int32(1); sequence < sequences; sequence++ {
		want := save(t, f, llama.SeqId(sequence))
		moving.Go(func() {
			random := rand.New(rand.NewPCG(uint64(sequence), 3))
			s := f.llama.Sequence(sequence)
			state := make([]byte, want.Len())
			for range rounds {
				ctx, cancel := context.WithCancel(context.Background())
				if random.IntN(2) == 0 {
					time.AfterFunc(time.Duration(random.IntN(8000))*time.Microsecond, cancel)
				}
				_, err := s.Save(ctx, kvferry.Bytes(state))
				if err == nil && !bytes.Equal(state, want.Bytes()) {
					t.Error("a save is damaged")
				}
				if err == nil {
					_, err = s.Load(ctx, kvferry.Bytes(state))
				}
				cancel()
				mutex.Lock()
				if err == nil {
					whole++
				} else {
					cancelled++
				}
				mutex.Unlock()
				if err == nil {
					continue
				}
				if !errors.Is(err, kvferry.ErrCancelled) || !errors.Is(err, context.Canceled) {
					t.Errorf("got %v", err)
				}
				// As it was, or empty: never a part of it.
				if size, err := s.Size(); err != nil || size != want.Len() && size > 1000 {
					t.Errorf("size %d, %v", size, err)
				}
				if _, err := s.Load(context.Background(), want); err != nil {
					t.Error(err)
				}
			}
		})
	}
	moving.Wait()
	close(stop)
	decoding.Wait()
	if cancelled == 0 || whole == 0 {
		t.Errorf("%d cancelled, %d whole: the test has lost its point", cancelled, whole)
	}
	t.Logf("%d whole, %d cancelled", whole, cancelled)
}

func TestLlamaClosesUnderLoad(t *testing.T) {
	for range 5 {
		_, f := newModel(t, 3, 60, 0, 1, 2)
		var group sync.WaitGroup
		for sequence := range int32(3) {
			state := save(t, f, llama.SeqId(sequence))
			group.Go(func() {
				for {
					_, err := f.llama.Sequence(sequence).Load(context.Background(), state)
					if errors.Is(err, kvferry.ErrClosed) {
						return
					}
					if err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		time.Sleep(5 * time.Millisecond)
		if err := f.llama.Close(); err != nil {
			t.Error(err)
		}
		group.Wait()
	}
}
