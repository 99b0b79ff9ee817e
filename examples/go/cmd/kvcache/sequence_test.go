package main

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"

	"example.org/kvferry"
)

func TestSavedStateIsLlamaCppsOwn(t *testing.T) {
	m, f := newModel(t, 2, 300, 0)
	own := llamaMover{m}
	size, err := own.size(0)
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, size)
	if _, err := own.saveBytes(0, want); err != nil {
		t.Fatal(err)
	}
	state := save(t, f, 0)
	if !bytes.Equal(state.Bytes(), want) {
		t.Fatal("the states differ")
	}
	// And loaded into the other sequence by either it continues in the same way.
	next := tokens(1, 9)
	if _, err := f.load(context.Background(), 1, state); err != nil {
		t.Fatal(err)
	}
	ferried, err := m.feed(context.Background(), 1, 300, next)
	if err != nil {
		t.Fatal(err)
	}
	m.clear(1)
	if _, err := own.loadBytes(1, want); err != nil {
		t.Fatal(err)
	}
	loaded, err := m.feed(context.Background(), 1, 300, next)
	if err != nil {
		t.Fatal(err)
	}
	original, err := m.feed(context.Background(), 0, 300, next)
	if err != nil {
		t.Fatal(err)
	}
	if !sameBits(ferried, loaded) || !sameBits(ferried, original) {
		t.Error("the logits differ")
	}
}

func TestALoadAheadLeavesTheSame(t *testing.T) {
	_, f := newModel(t, 2, 300, 0)
	state := save(t, f, 0)
	completion, err := f.llama.Sequence(1).Load(context.Background(), state, kvferry.Ahead())
	if err != nil {
		t.Fatal(err)
	}
	if completion.Ahead || completion.Mode != 0 { // this cache is in host memory
		t.Errorf("%+v", completion)
	}
	loaded := save(t, f, 1)
	if _, err := f.llama.Sequence(1).Load(context.Background(), state); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(loaded.Bytes(), save(t, f, 1).Bytes()) {
		t.Error("the states differ")
	}
}

func TestGoMemoryHoldsAStateToo(t *testing.T) {
	_, f := newModel(t, 1, 100, 0)
	size, err := f.size(0)
	if err != nil {
		t.Fatal(err)
	}
	state := make([]byte, size)
	completion, err := f.llama.Sequence(0).Save(context.Background(), kvferry.Bytes(state))
	if err != nil {
		t.Fatal(err)
	}
	if completion.Bytes != int64(size) || completion.Mode != kvferry.InPlace || completion.Fragments == 0 {
		t.Errorf("%+v", completion)
	}
	if !bytes.Equal(state, save(t, f, 0).Bytes()) {
		t.Error("the states differ")
	}
}

func TestBufferHoldsASmallerState(t *testing.T) {
	_, f := newModel(t, 2, 100, 0)
	want := save(t, f, 0)
	buffer, err := f.engine.NewBuffer(2 * want.Len())
	if err != nil {
		t.Fatal(err)
	}
	defer buffer.Close()
	completion, err := f.llama.Sequence(0).Save(context.Background(), buffer)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.llama.Sequence(1).Load(context.Background(), buffer.Slice(0, int(completion.Bytes))); err != nil {
		t.Fatal(err)
	}
	loaded := save(t, f, 1)
	if _, err := f.llama.Sequence(1).Load(context.Background(), want); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(loaded.Bytes(), save(t, f, 1).Bytes()) {
		t.Error("the states differ")
	}
}

func TestRemovedSequenceIsEmpty(t *testing.T) {
	_, f := newModel(t, 1, 20, 0)
	if err := f.llama.Sequence(0).Remove(); err != nil {
		t.Fatal(err)
	}
	if _, err := f.llama.Sequence(0).Save(context.Background(), kvferry.Bytes(make([]byte, 1<<20))); !errors.Is(err, kvferry.ErrSequenceEmpty) {
		t.Errorf("got %v", err)
	}
}

func TestStateThatIsRefusedCostsTheSequenceNothing(t *testing.T) {
	_, f := newModel(t, 1, 50, 0)
	state := save(t, f, 0)
	damaged := bytes.Clone(state.Bytes())
	damaged[0]++
	if _, err := f.llama.Sequence(0).Load(context.Background(), kvferry.Bytes(damaged)); !errors.Is(err, kvferry.ErrStateDamaged) {
		t.Errorf("got %v", err)
	}
	if !bytes.Equal(save(t, f, 0).Bytes(), state.Bytes()) {
		t.Error("the sequence has changed")
	}
}

// The format of a context is not known before it has held something, so a trusted state reaches libllama.
func TestTrustedStateIsLeftToLibllama(t *testing.T) {
	_, f := newModel(t, 1, 50, 0)
	damaged := bytes.Clone(save(t, f, 0).Bytes())
	damaged[0]++
	_, empty := newModel(t, 1, 50)
	for _, c := range []struct {
		options []kvferry.Option
		want    error
	}{{nil, kvferry.ErrStateDamaged}, {[]kvferry.Option{kvferry.TrustState()}, kvferry.ErrLlama}} {
		_, err := empty.llama.Sequence(0).Load(context.Background(), kvferry.Bytes(damaged), c.options...)
		if !errors.Is(err, c.want) {
			t.Errorf("%v, not %v", err, c.want)
		}
	}
}

func TestRefusals(t *testing.T) {
	_, f := newModel(t, 2, 50, 0)
	ctx := context.Background()
	state := save(t, f, 0)
	damaged := bytes.Clone(state.Bytes())
	damaged[0]++
	small := kvferry.Bytes(make([]byte, 100))
	for name, refusal := range map[string]struct {
		do   func() error
		want error
	}{
		"an empty sequence": {func() error { _, err := f.llama.Sequence(1).Save(ctx, small); return err }, kvferry.ErrSequenceEmpty},
		"no such sequence":  {func() error { _, err := f.llama.Sequence(7).Size(); return err }, kvferry.ErrSequenceRange},
		"a small buffer":    {func() error { _, err := f.llama.Sequence(0).Save(ctx, small); return err }, kvferry.ErrBufferTooSmall},
		"a damaged state":   {func() error { _, err := f.llama.Sequence(1).Load(ctx, kvferry.Bytes(damaged)); return err }, kvferry.ErrStateDamaged},
		"a truncated state": {func() error { _, err := f.llama.Sequence(1).Load(ctx, kvferry.Bytes(damaged[:1000])); return err }, kvferry.ErrStateDamaged},
		"an engine in use":  {func() error { return f.engine.Close() }, kvferry.ErrBusy},
		"no lock":           {func() error { _, err := f.engine.Attach(1, nil, kvferry.AttachOptions{}); return err }, kvferry.ErrInvalidArgument},
		"no such library": {func() error {
			_, err := f.engine.Attach(1, &sync.Mutex{}, kvferry.AttachOptions{Library: "/nowhere"})
			return err
		}, kvferry.ErrLibraryNotFound},
	} {
		if err := refusal.do(); !errors.Is(err, refusal.want) {
			t.Errorf("%s gave %v", name, err)
		}
	}
}
