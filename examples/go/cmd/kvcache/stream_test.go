package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"testing"

	"example.org/kvferry"
)

// A process opens the CUDA driver once, so the test with the simulated driver has a process of its own.
func TestLoadLeavesNoHalfOfAStateWhenTheProgramsFunctionPanics(t *testing.T) {
	const child = "KVFERRY_TEST_PANICS"
	driver := os.Getenv("KVFERRY_SIMULATED_CUDA")
	if os.Getenv(child) == "" {
		if driver == "" {
			t.Skip("no simulated CUDA driver: KVFERRY_SIMULATED_CUDA names it")
		}
		command := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
		command.Env = append(os.Environ(), child+"=1", "KVFERRY_CUDA_DRIVER="+driver)
		if said, err := command.CombinedOutput(); err != nil {
			t.Fatalf("%v:\n%s", err, said)
		}
		return
	}
	m, f := newModel(t, 2, 1000, 0, 1)
	state, other := save(t, f, 0), save(t, f, 1)
	load := func(state *kvferry.Buffer, options ...kvferry.Option) {
		defer func() { recover() }()
		if _, err := f.llama.Sequence(1).Load(context.Background(), state, options...); err != nil {
			t.Error(err)
		}
	}
	content := func() []byte { // by llama.cpp's own calls: those of kvferry's would empty the sequence
		size, err := llamaMover{m}.size(1)
		if err != nil {
			t.Fatal(err)
		}
		bytes := make([]byte, size)
		if _, err := (llamaMover{m}).saveBytes(1, bytes); err != nil {
			t.Fatal(err)
		}
		return bytes
	}
	load(state)
	whole := content()
	const legacyStream = 1
	empty := 0
	for attempt := 0; empty < 5; attempt++ {
		if attempt == 500 {
			t.Fatal("no load was cancelled in time")
		}
		load(other) // what is not overwritten is seen
		load(state, kvferry.StreamWait(legacyStream, func() { panic("launch failed") }))
		found := content()
		if len(found) < len(whole)/2 {
			empty++
		} else if !bytes.Equal(found, whole) {
			t.Fatal("the sequence holds a part of the state")
		}
	}
}
