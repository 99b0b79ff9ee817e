package kvferry_test

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"testing"

	"example.org/kvferry"
)

func TestAStateIsCutAndJoined(t *testing.T) {
	for _, kind := range []string{"", "gemma3", "hybrid"} {
		t.Run(kind, func(t *testing.T) {
			llama, engine, model := attach(t, kind)
			llama.Decode(0, words(100, 1)...)
			llama.Decode(1, words(7, 2)...)
			parts, err := model.PartsInBlocks()
			if err != nil || parts != 1 {
				t.Fatal(parts, err)
			}
			state := kvferry.Bytes(stateOfSequence(t, model.Sequence(0)))
			saved := cut(t, engine, model, 0, 32, 64, 100)
			saveBlocks(t, model.Sequence(0), saved)

			blocks := []kvferry.Block{{End: 32}, {Begin: 32, End: 64}, {Begin: 64, End: 100, Key: "k", Fingerprint: model.Fingerprint()}}
			blocks[1].Memory = newBuffer(t, engine, saved[1].Size+10)
			checkpoint, err := kvferry.CutState(state, blocks, parts)
			if err != nil {
				t.Fatal(err)
			}
			for i, block := range blocks {
				memory, _ := block.Memory.(kvferry.Bytes)
				if i == 1 {
					memory = block.Memory.(*kvferry.Buffer).Bytes()[:block.Size]
				}
				if !bytes.Equal(memory, saved[i].Memory.(*kvferry.Buffer).Bytes()) || block.Size != saved[i].Size {
					t.Errorf("block %d differs", i)
				}
			}
			if (checkpoint == nil) != (kind == "") {
				t.Fatal(checkpoint)
			}
			if checkpoint != nil && (checkpoint.Position != 99 || checkpoint.Key != "k" || checkpoint.Fingerprint != model.Fingerprint()) {
				t.Errorf("%+v", checkpoint)
			}
			joined, err := kvferry.JoinBlocks(blocks, checkpoint, parts)
			if err != nil || !bytes.Equal(joined, state) {
				t.Errorf("the state differs, %v", err)
			}
			if _, err := model.Sequence(1).LoadBlocks(context.Background(), blocks, checkpoint); err != nil {
				t.Fatal(err)
			}
			if expected := llama.Decode(0, 5); llama.Decode(1, 5) != expected {
				t.Error("the sequence goes on in another way")
			}
		})
	}
}

func TestWhatCannotBeCutOrJoinedIsRefused(t *testing.T) {
	llama, _, model := attach(t, "")
	llama.Decode(0, words(64, 1)...)
	state := kvferry.Bytes(stateOfSequence(t, model.Sequence(0)))
	make2 := func() []kvferry.Block { return []kvferry.Block{{End: 32}, {Begin: 32, End: 64}} }
	for _, wrong := range []struct {
		state  kvferry.Memory
		blocks []kvferry.Block
		parts  int
		status kvferry.Status
	}{
		{state[:len(state)-1], make2(), 1, kvferry.ErrStateDamaged},
		{state, nil, 1, kvferry.ErrInvalidArgument},
		{nil, make2(), 1, kvferry.ErrInvalidArgument},
		{state, make2(), -1, kvferry.ErrInvalidArgument},
		{state, make2(), 2, kvferry.ErrUnsupported},
		{state, []kvferry.Block{{End: 32}, {Begin: 31, End: 64}}, 1, kvferry.ErrInvalidArgument},
		{state, []kvferry.Block{{Begin: -1, End: 32}}, 1, kvferry.ErrInvalidArgument},
		{state, []kvferry.Block{{Begin: 64, End: 65}}, 1, kvferry.ErrSequenceEmpty},
	} {
		before := slices.Clone(wrong.blocks)
		if _, err := kvferry.CutState(wrong.state, wrong.blocks, wrong.parts); !errors.Is(err, wrong.status) {
			t.Errorf("%v: %v", wrong.status.Name(), err)
		}
		if !slices.Equal(wrong.blocks, before) {
			t.Errorf("%v: the blocks have changed", wrong.status.Name())
		}
	}

	blocks := make2()
	if checkpoint, err := kvferry.CutState(state, blocks, 0); err != nil || checkpoint != nil {
		t.Fatal(checkpoint, err)
	}
	small := make2()
	small[1].Memory = kvferry.Bytes(make([]byte, 10))
	if _, err := kvferry.CutState(state, small, 0); !errors.Is(err, kvferry.ErrBufferTooSmall) {
		t.Error(err)
	}
	if small[0].Size != blocks[0].Size || small[1].Size != blocks[1].Size {
		t.Errorf("%d and %d bytes", small[0].Size, small[1].Size)
	}

	with := func(change func(blocks []kvferry.Block)) []kvferry.Block {
		changed := slices.Clone(blocks)
		change(changed)
		return changed
	}
	for _, wrong := range []struct {
		blocks []kvferry.Block
		status kvferry.Status
	}{
		{nil, kvferry.ErrInvalidArgument},
		{blocks[1:2:2][:0], kvferry.ErrInvalidArgument},
		{with(func(b []kvferry.Block) { b[0].Memory = nil }), kvferry.ErrInvalidArgument},
		{with(func(b []kvferry.Block) { b[0].Size++ }), kvferry.ErrInvalidArgument},
		{with(func(b []kvferry.Block) { b[0].Size-- }), kvferry.ErrStateDamaged},
		{with(func(b []kvferry.Block) { b[1].Begin++ }), kvferry.ErrInvalidArgument},
		{with(func(b []kvferry.Block) { b[0], b[1] = b[1], b[0] }), kvferry.ErrInvalidArgument},
		{with(func(b []kvferry.Block) { b[0].Key, b[1].Parent = "a", "b" }), kvferry.ErrStateMismatch},
		{with(func(b []kvferry.Block) { b[0].Fingerprint, b[1].Fingerprint = "a", "b" }), kvferry.ErrStateMismatch},
	} {
		if _, err := kvferry.JoinBlocks(wrong.blocks, nil, 0); !errors.Is(err, wrong.status) {
			t.Errorf("%v: %v", wrong.status.Name(), err)
		}
	}
	if _, err := kvferry.JoinBlocks(blocks, kvferry.Bytes("no checkpoint"), 0); !errors.Is(err, kvferry.ErrStateDamaged) {
		t.Error(err)
	}
}

func TestPartsOfAnotherModelOrConversationAreRefused(t *testing.T) {
	llama, engine, model := attach(t, "hybrid")
	llama.Decode(0, words(64, 1)...)
	llama.Decode(1, words(9, 2)...)
	before := stateOfSequence(t, model.Sequence(1))
	good := cut(t, engine, model, 0, 32, 64)
	good[0].Key, good[1].Parent, good[1].Key = "a", "a", "b"
	saveBlocks(t, model.Sequence(0), good)
	size, err := model.Sequence(0).CheckpointSize()
	if err != nil {
		t.Fatal(err)
	}
	checkpoint := kvferry.Checkpoint{Memory: newBuffer(t, engine, size+100), Position: 63, Key: "b", Size: 3}
	if _, err := model.Sequence(0).SaveCheckpoint(context.Background(), &checkpoint); err != nil {
		t.Fatal(err)
	}
	if checkpoint.Size != size || checkpoint.Fingerprint != model.Fingerprint() || good[1].Fingerprint != model.Fingerprint() {
		t.Errorf("%+v", checkpoint)
	}
	for name, change := range map[string]func(blocks []kvferry.Block, checkpoint *kvferry.Checkpoint){
		"a block of another model":             func(b []kvferry.Block, _ *kvferry.Checkpoint) { b[1].Fingerprint = "another" },
		"a checkpoint of another model":        func(_ []kvferry.Block, c *kvferry.Checkpoint) { c.Fingerprint = "another" },
		"a block of another conversation":      func(b []kvferry.Block, _ *kvferry.Checkpoint) { b[1].Parent = "c" },
		"a checkpoint of another conversation": func(_ []kvferry.Block, c *kvferry.Checkpoint) { c.Key = "c" },
	} {
		blocks, other := slices.Clone(good), checkpoint
		change(blocks, &other)
		if _, err := model.Sequence(1).LoadBlocks(context.Background(), blocks, &other); !errors.Is(err, kvferry.ErrStateMismatch) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, wrong := range []kvferry.Memory{(*kvferry.Checkpoint)(nil), &kvferry.Checkpoint{}, &kvferry.Checkpoint{Memory: &checkpoint}} {
		if _, err := model.Sequence(1).LoadBlocks(context.Background(), good, wrong); !errors.Is(err, kvferry.ErrInvalidArgument) {
			t.Error(err)
		}
		if _, err := model.Sequence(0).SaveCheckpoint(context.Background(), wrong); !errors.Is(err, kvferry.ErrInvalidArgument) {
			t.Error(err)
		}
	}
	if !bytes.Equal(stateOfSequence(t, model.Sequence(1)), before) {
		t.Error("the sequence has changed")
	}
	if _, err := model.Sequence(1).LoadBlocks(context.Background(), good, &checkpoint); err != nil {
		t.Fatal(err)
	}
	if expected := llama.Decode(0, 5); llama.Decode(1, 5) != expected {
		t.Error("the sequence goes on in another way")
	}
}
