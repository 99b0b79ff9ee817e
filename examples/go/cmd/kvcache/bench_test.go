package main

import (
	"context"
	"errors"
	"testing"

	"github.com/hybridgroup/yzma/pkg/llama"

	"example.org/kvferry"
)

// BenchmarkSequence compares saves and loads with llama.cpp's own calls, on the same context.
func BenchmarkSequence(b *testing.B) {
	m, f := newModel(b, 2, 1000, 0)
	own := llamaMover{m}
	state := save(b, f, 0)
	memory := make([]byte, state.Len())
	ctx := context.Background()
	urgent := kvferry.WithPriority(kvferry.Urgent)
	for _, bench := range []struct {
		name string
		do   func() error
	}{
		{"Size/yzma", func() error { _, err := own.size(0); return err }},
		{"Size/kvferry", func() error { _, err := f.size(0); return err }},
		{"Save/yzma", func() error {
			if n := llama.StateSeqGetData(m.context, memory, 0); n != uint64(len(memory)) {
				return errors.New("not saved")
			}
			return nil
		}},
		{"Save/kvferry", func() error { _, err := f.llama.Sequence(0).Save(ctx, state, urgent); return err }},
		{"Save/kvferry-background", func() error { _, err := f.llama.Sequence(0).Save(ctx, state); return err }},
		{"Save/kvferry-bytes", func() error { _, err := f.llama.Sequence(0).Save(ctx, kvferry.Bytes(memory), urgent); return err }},
		{"Load/yzma", func() error { _, err := own.loadBytes(1, memory); return err }},
		{"Load/kvferry", func() error { _, err := f.llama.Sequence(1).Load(ctx, state, urgent); return err }},
	} {
		b.Run(bench.name, func(b *testing.B) {
			if bench.name[:4] != "Size" {
				b.SetBytes(int64(len(memory)))
			}
			b.ReportAllocs()
			for range b.N {
				if err := bench.do(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
