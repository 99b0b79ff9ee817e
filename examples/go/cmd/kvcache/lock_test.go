package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"
	"unsafe"

	"example.org/kvferry"
)

// announcedLock sends a message before a goroutine waits for it.
type announcedLock struct {
	sync.Locker
	asked chan struct{}
}

func (l announcedLock) Lock() {
	l.asked <- struct{}{}
	l.Locker.Lock()
}

func TestLoadThatIsTooLateWhenItHasTheLockLeavesTheSequence(t *testing.T) {
	m, f := newModel(t, 2, 50, 0, 1)
	state := save(t, f, 0)
	before := save(t, f, 1)
	lock := announcedLock{&m.mutex, make(chan struct{}, 8)}
	attached, err := f.engine.Attach(uintptr(m.context), lock, kvferry.AttachOptions{})
	if err != nil {
		t.Fatal(err)
	}
	<-lock.asked

	ctx, cancel := context.WithCancelCause(context.Background())
	late := errors.New("too late")
	m.mutex.Lock()
	ended := make(chan error)
	go func() {
		_, err := attached.Sequence(1).Load(ctx, state)
		ended <- err
	}()
	<-lock.asked
	cancel(late)
	m.mutex.Unlock()
	if err := <-ended; !errors.Is(err, kvferry.ErrCancelled) || !errors.Is(err, late) {
		t.Errorf("got %v", err)
	}
	if len(lock.asked) > 0 {
		t.Error("nothing was begun, and the lock was waited for a second time")
	}
	if !bytes.Equal(save(t, f, 1).Bytes(), before.Bytes()) {
		t.Error("the sequence has changed")
	}
	if err := attached.Close(); err != nil {
		t.Error(err)
	}
}

func TestCallsThatDoNotNeedTheContextDoNotWaitForIt(t *testing.T) {
	m, f := newModel(t, 2, 50, 0)
	other, _ := newModel(t, 2, 50)
	state := save(t, f, 0)
	lock := announcedLock{&m.mutex, make(chan struct{}, 8)}
	m.mutex.Lock()
	var waiting sync.WaitGroup
	waiting.Go(func() {
		attached, err := f.engine.Attach(uintptr(m.context), lock, kvferry.AttachOptions{})
		if err != nil {
			t.Error(err)
			return
		}
		if err := attached.Close(); err != nil {
			t.Error(err)
		}
	})
	<-lock.asked
	for name, call := range map[string]func() error{
		"Engine.Describe": func() error { _, err := f.engine.Describe(); return err },
		"Engine.Trim":     func() error { return f.engine.Trim() },
		"Llama.Describe":  func() error { _, err := f.llama.Describe(); return err },
		"a buffer": func() error {
			buffer, err := f.engine.NewBuffer(1 << 20)
			if err != nil {
				return err
			}
			return buffer.Close()
		},
		"a transfer": func() error {
			region := kvferry.Region{Address: unsafe.Pointer(&make([]byte, 1<<20)[0]), Width: 1 << 20, Rows: 1}
			_, err := f.engine.SaveRegions(context.Background(), []kvferry.Region{region}, kvferry.Bytes(make([]byte, 1<<20)))
			return err
		},
		"another context": func() error {
			attached, err := f.engine.Attach(uintptr(other.context), &other.mutex, kvferry.AttachOptions{})
			if err != nil {
				return err
			}
			if _, err := attached.Sequence(0).Load(context.Background(), state); err != nil {
				return err
			}
			return attached.Close()
		},
		"Engine.Close": func() error {
			if err := f.engine.Close(); !errors.Is(err, kvferry.ErrBusy) {
				return fmt.Errorf("got %w", err)
			}
			return nil
		},
	} {
		ended := make(chan error, 1)
		go func() { ended <- call() }()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		case <-time.After(10 * time.Second):
			t.Errorf("%s waits for the context's lock", name)
		}
	}
	m.mutex.Unlock()
	waiting.Wait()
}

// The blocking calls run on a thread of the engine, so nothing else may use the context until they have ended.
func TestBlockingTransfersHoldTheLockUntilTheyHaveEnded(t *testing.T) {
	m, f := newModel(t, 2, 500, 0)
	blocking, err := f.engine.Attach(uintptr(m.context), &m.mutex, kvferry.AttachOptions{ForceBlocking: true})
	if err != nil {
		t.Fatal(err)
	}
	defer blocking.Close()
	state := save(t, f, 0)
	copied := make([]byte, state.Len())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for range 50 {
			if _, err := blocking.Sequence(0).Save(context.Background(), kvferry.Bytes(copied)); err != nil {
				t.Error(err)
				return
			}
			if _, err := blocking.Sequence(1).Load(context.Background(), state); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	for running := true; running; {
		select {
		case <-ended:
			running = false
		default:
		}
		if _, err := f.llama.Sequence(0).Size(); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(copied, state.Bytes()) {
		t.Error("the states differ")
	}
}
