package main

import (
	"context"

	"example.org/kvferry"
	"github.com/hybridgroup/yzma/pkg/llama"
)

// inBlocks keeps conversations in blocks. After a turn it saves the tokens that no block holds yet; before a turn it loads
// the longest prefix that blocks hold, whichever conversation they came from.
type inBlocks struct {
	engine   *kvferry.Engine // its PinnedLimit is the cache's budget
	model    *model
	mover    kvferryMover
	length   int // tokens of a block, at most
	blocks   *blockCache[*kvferry.Buffer]
	allowed  kvferry.BlocksAllowed // BlocksUnseen until the first turn has ended
	reason   string                // why not more is allowed
	measured wayFigures
}

func newInBlocks(engine *kvferry.Engine, m *model, mover kvferryMover, s settings) *inBlocks {
	release := func(memory *kvferry.Buffer) {
		if memory != nil {
			memory.Close()
		}
	}
	return &inBlocks{engine: engine, model: m, mover: mover, length: s.Block, blocks: newBlockCache(s.Budget, release)}
}

func (w *inBlocks) begin(ctx context.Context, sequence llama.SeqId, _ int, said []llama.Token) (int, error) {
	found := w.find(said)
	if len(found) == 0 {
		w.blocks.counts.Misses++
		return 0, nil
	}
	w.blocks.counts.Hits++
	w.blocks.use(found)
	load, bytes, err := w.load(ctx, sequence, found)
	if err != nil {
		return 0, err
	}
	w.measured.loads = append(w.measured.loads, load.took)
	w.measured.held = append(w.measured.held, load.held)
	w.measured.loadedBytes += bytes
	return found[len(found)-1].end, nil
}

// find returns the blocks to load for a conversation. They hold at least one token less than it has, because the last
// token must be decoded for its logits.
func (w *inBlocks) find(said []llama.Token) []*block[*kvferry.Buffer] {
	return w.blocks.longest(said[:len(said)-1], func(b *block[*kvferry.Buffer]) bool {
		return b.hasCheckpoint || !w.allowed.NeedCheckpoint()
	})
}

// load loads blocks that follow one another, and the checkpoint at their end where there has to be one.
func (w *inBlocks) load(ctx context.Context, sequence llama.SeqId, found []*block[*kvferry.Buffer]) (transfer, int64, error) {
	var checkpoint kvferry.Memory
	if w.allowed.NeedCheckpoint() {
		checkpoint = found[len(found)-1].checkpoint
	}
	return w.mover.loadBlocks(ctx, sequence, w.blocksOf(found), checkpoint)
}

// blocksOf returns blocks as kvferry takes them: none where checkpoints stand alone.
func (w *inBlocks) blocksOf(kept []*block[*kvferry.Buffer]) (blocks []kvferry.Block) {
	if w.allowed.NeedBlocks() {
		for _, b := range kept {
			blocks = append(blocks, kvferry.Block{Memory: b.state, Begin: b.begin, End: b.end})
		}
	}
	return blocks
}

func (w *inBlocks) end(ctx context.Context, sequence llama.SeqId, _ int, held []llama.Token) (err error) {
	defer w.model.clear(sequence)
	if w.allowed == kvferry.BlocksUnseen {
		if w.allowed, w.reason, err = w.mover.llama.BlocksAllowed(); err != nil {
			return err
		}
	}
	if w.allowed == kvferry.BlocksNone {
		w.blocks.counts.Refusals++
		return nil
	}
	anywhere := func(*block[*kvferry.Buffer]) bool { return true }
	known := w.blocks.longest(held, anywhere)
	w.blocks.use(known)
	hold(known, true)
	added, err := w.add(known, held)
	all := append(known, added...)
	defer hold(all, false)
	w.blocks.use(all)
	if err == nil {
		err = w.save(ctx, sequence, all, added, len(held))
	}
	if err != nil {
		for i := len(added) - 1; i >= 0; i-- { // their bytes may not have been saved
			w.blocks.drop(added[i])
		}
	}
	return err
}

func hold(blocks []*block[*kvferry.Buffer], held bool) {
	for _, b := range blocks {
		b.held = held
	}
}

// add makes blocks for the tokens that follow the known ones, as many as the budget allows, and holds them. A block ends
// where the turn ended, or at a multiple of its length, so that conversations that begin alike are cut alike.
func (w *inBlocks) add(known []*block[*kvferry.Buffer], held []llama.Token) (added []*block[*kvferry.Buffer], err error) {
	begin, before := 0, blockKey{}
	if len(known) > 0 {
		last := known[len(known)-1]
		begin, before = last.end, last.key
	}
	for begin < len(held) {
		end := min(len(held), (begin/w.length+1)*w.length)
		state, size, err := w.room(end - begin)
		if err != nil || state == nil && w.allowed.NeedBlocks() {
			return added, err
		}
		b := w.blocks.put(before, begin, held[begin:end], state, size)
		b.held = true
		added = append(added, b)
		begin, before = end, b.key
	}
	return added, nil
}

// room returns memory for a block, and the bytes that it takes: nil where the budget does not allow it, and where a block
// has no state.
func (w *inBlocks) room(tokens int) (*kvferry.Buffer, int64, error) {
	if !w.allowed.NeedBlocks() {
		return nil, 0, nil
	}
	size, err := w.mover.llama.BlockSize(tokens)
	if err != nil {
		return nil, 0, err
	}
	return w.allocate(size)
}

// allocate returns a buffer within the budget, or nil.
func (w *inBlocks) allocate(size int) (*kvferry.Buffer, int64, error) {
	if !w.blocks.makeRoom(wholePages(size)) {
		return nil, 0, nil
	}
	buffer, err := w.engine.NewBuffer(size)
	if err != nil {
		return nil, 0, err
	}
	return buffer, int64(buffer.Cap()), nil
}

// save saves the added blocks, and a checkpoint where the cache needs one and all tokens of the sequence are in blocks.
func (w *inBlocks) save(ctx context.Context, sequence llama.SeqId, all, added []*block[*kvferry.Buffer], tokens int) error {
	var whole transfer
	if blocks := w.blocksOf(added); len(blocks) > 0 {
		save, bytes, err := w.mover.saveBlocks(ctx, sequence, blocks)
		if err != nil {
			return err
		}
		whole = whole.plus(save)
		w.measured.savedBytes += bytes
	}
	if w.allowed.NeedCheckpoint() && len(all) > 0 {
		if last := all[len(all)-1]; last.end == tokens && !last.hasCheckpoint {
			save, bytes, err := w.saveCheckpoint(ctx, sequence, last)
			if err != nil {
				return err
			}
			whole = whole.plus(save)
			w.measured.savedBytes += bytes
		}
	}
	if whole != (transfer{}) {
		w.measured.saves = append(w.measured.saves, whole.took)
		w.measured.held = append(w.measured.held, whole.held)
	}
	return nil
}

// saveCheckpoint keeps a checkpoint of the sequence with the block that it ends with, if the budget allows it.
func (w *inBlocks) saveCheckpoint(ctx context.Context, sequence llama.SeqId, b *block[*kvferry.Buffer]) (save transfer, bytes int64, err error) {
	size, err := w.mover.llama.Sequence(int32(sequence)).CheckpointSize()
	if err != nil {
		return transfer{}, 0, err
	}
	buffer, taken, err := w.allocate(size)
	if err != nil || buffer == nil {
		return transfer{}, 0, err
	}
	if save, bytes, err = w.mover.saveCheckpoint(ctx, sequence, buffer); err != nil {
		buffer.Close()
		return save, bytes, err
	}
	w.blocks.putCheckpoint(b, buffer, taken)
	return save, bytes, nil
}

func (w *inBlocks) figures() wayFigures {
	w.measured.counts = w.blocks.counts
	w.measured.keptBytes = w.blocks.used
	return w.measured
}

func (w *inBlocks) close() {
	w.blocks.clear()
	w.mover.close()
}
