package kvferry_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"unsafe"

	"example.org/kvferry"
)

// A conversation leaves the KV cache for host memory, and comes back into another sequence.
func Example() {
	// This stands for the bindings of llama.cpp that you use. kvferry needs the address of the llama_context, and the
	// lock that your program holds around llama_decode.
	llama := openContext()
	defer llama.Close()
	llama.Decode(0, 3, 1, 4, 1, 5, 9, 2, 6)

	engine, err := kvferry.NewEngine(kvferry.EngineOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer engine.Close()
	model, err := engine.Attach(llama.Address, &llama.Lock, kvferry.AttachOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer model.Close() // before the context is freed and the engine is closed

	sequence := model.Sequence(0)
	size, err := sequence.Size()
	if err != nil {
		log.Fatal(err)
	}
	state, err := engine.NewBuffer(size) // pinned memory
	if err != nil {
		log.Fatal(err)
	}
	defer state.Close()
	if _, err := sequence.Save(context.Background(), state); err != nil {
		log.Fatal(err)
	}
	expected := llama.Decode(0, 5)
	if err := sequence.Remove(); err != nil { // its cells are free for others
		log.Fatal(err)
	}

	if _, err := model.Sequence(2).Load(context.Background(), state); err != nil {
		log.Fatal(err)
	}
	fmt.Println("goes on as before:", llama.Decode(2, 5) == expected)
	// Output:
	// goes on as before: true
}

// The lock is any sync.Locker that guards the llama_context. Do not hold it while you call kvferry.
func ExampleEngine_Attach() {
	llama := openContext() // stands for your bindings of llama.cpp
	defer llama.Close()
	engine, err := kvferry.NewEngine(kvferry.EngineOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer engine.Close()

	model, err := engine.Attach(llama.Address, &llama.Lock, kvferry.AttachOptions{})
	if errors.Is(err, kvferry.ErrLibraryNotFound) {
		log.Fatal("load libllama before you attach: ", err)
	} else if err != nil {
		log.Fatal(err)
	}
	fmt.Println("closing the engine now:", engine.Close())
	if err := model.Close(); err != nil { // waits for transfers, and detaches
		log.Fatal(err)
	}
	fmt.Println("closing it after that:", engine.Close())
	// Output:
	// closing the engine now: in use by a job in flight or by another object: a llama context is attached
	// closing it after that: <nil>
}

// Save blocks its goroutine only: other goroutines decode other sequences meanwhile. A context.Context ends a save
// early.
func ExampleSequence_Save() {
	llama := openContext() // stands for your bindings of llama.cpp
	defer llama.Close()
	llama.Decode(0, 3, 1, 4, 1, 5, 9, 2, 6)
	engine, err := kvferry.NewEngine(kvferry.EngineOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer engine.Close()
	model, err := engine.Attach(llama.Address, &llama.Lock, kvferry.AttachOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer model.Close()

	sequence := model.Sequence(0)
	size, err := sequence.Size()
	if err != nil {
		log.Fatal(err)
	}
	state := make([]byte, size) // a Buffer of the engine is faster on a GPU
	saved := make(chan error)
	go func() {
		completion, err := sequence.Save(context.Background(), kvferry.Bytes(state))
		if err == nil && completion.Bytes != int64(size) {
			err = errors.New("the sequence has grown")
		}
		saved <- err
	}()
	for token := range int32(10) {
		llama.Decode(1, token) // in the meantime
	}
	fmt.Println("saved:", <-saved)

	ended, cancel := context.WithCancelCause(context.Background())
	cancel(errors.New("the user has left"))
	_, err = sequence.Save(ended, kvferry.Bytes(state))
	fmt.Println(err)
	fmt.Println(errors.Is(err, kvferry.ErrCancelled))

	_, err = model.Sequence(2).Save(context.Background(), kvferry.Bytes(state))
	fmt.Println(errors.Is(err, kvferry.ErrSequenceEmpty))
	// Output:
	// saved: <nil>
	// the job was cancelled: the user has left
	// true
	// true
}

// A load that somebody waits for is urgent. A state that is refused leaves the sequence as it was.
func ExampleSequence_Load() {
	llama := openContext() // stands for your bindings of llama.cpp
	defer llama.Close()
	llama.Decode(0, 3, 1, 4, 1, 5, 9, 2, 6)
	engine, err := kvferry.NewEngine(kvferry.EngineOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer engine.Close()
	model, err := engine.Attach(llama.Address, &llama.Lock, kvferry.AttachOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer model.Close()
	size, err := model.Sequence(0).Size()
	if err != nil {
		log.Fatal(err)
	}
	buffer, err := engine.NewBuffer(2 * size) // has room for a longer state too
	if err != nil {
		log.Fatal(err)
	}
	defer buffer.Close()
	state := buffer.Slice(0, size)
	if _, err := model.Sequence(0).Save(context.Background(), state); err != nil {
		log.Fatal(err)
	}
	expected := llama.Decode(0, 5)

	target := model.Sequence(1)
	if _, err := target.Load(context.Background(), state, kvferry.WithPriority(kvferry.Urgent)); err != nil {
		log.Fatal(err)
	}

	// What is not a state, byte for byte, is refused before llama.cpp sees it.
	_, err = target.Load(context.Background(), buffer)
	fmt.Println("refused:", errors.Is(err, kvferry.ErrStateDamaged))
	fmt.Println("goes on as before:", llama.Decode(1, 5) == expected)
	// Output:
	// refused: true
	// goes on as before: true
}

// After each turn only what is new is saved. A conversation that begins like another one takes the blocks of that
// beginning, and needs no prefill for them.
func ExampleSequence_SaveBlocks() {
	llama := openContext() // stands for your bindings of llama.cpp
	defer llama.Close()
	engine, err := kvferry.NewEngine(kvferry.EngineOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer engine.Close()
	model, err := engine.Attach(llama.Address, &llama.Lock, kvferry.AttachOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer model.Close()
	save := func(begin, end int) kvferry.Block {
		size, err := model.BlockSize(end - begin)
		if err != nil {
			log.Fatal(err)
		}
		block := kvferry.Block{Memory: kvferry.Bytes(make([]byte, size)), Begin: begin, End: end}
		completion, err := model.Sequence(0).SaveBlocks(context.Background(), []kvferry.Block{block})
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("saved positions %d to %d: %d bytes\n", begin, end-1, completion.Bytes)
		return block
	}

	llama.Decode(0, 3, 1, 4, 1, 5, 9, 2, 6) // the system prompt
	system := save(0, 8)
	llama.Decode(0, 5, 3)
	turn := save(8, 10)
	expected := llama.Decode(0, 5)

	// The same conversation, in another sequence.
	if _, err := model.Sequence(1).LoadBlocks(context.Background(), []kvferry.Block{system, turn}, nil); err != nil {
		log.Fatal(err)
	}
	fmt.Println("goes on as before:", llama.Decode(1, 5) == expected)

	// Another conversation with the same system prompt.
	if _, err := model.Sequence(2).LoadBlocks(context.Background(), []kvferry.Block{system}, nil); err != nil {
		log.Fatal(err)
	}
	llama.Decode(2, 8, 9, 7)
	// Output:
	// saved positions 0 to 7: 98720 bytes
	// saved positions 8 to 9: 24920 bytes
	// goes on as before: true
}

// A state of any program can be cut into blocks, and blocks be joined to a state that llama.cpp itself loads: no
// context is needed.
func ExampleCutState() {
	llama := openContext() // stands for your bindings of llama.cpp
	defer llama.Close()
	engine, err := kvferry.NewEngine(kvferry.EngineOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer engine.Close()
	model, err := engine.Attach(llama.Address, &llama.Lock, kvferry.AttachOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer model.Close()
	llama.Decode(0, 3, 1, 4, 1, 5, 9, 2, 6)
	size, err := model.Sequence(0).Size()
	if err != nil {
		log.Fatal(err)
	}
	state := make([]byte, size)
	if _, err := model.Sequence(0).Save(context.Background(), kvferry.Bytes(state)); err != nil {
		log.Fatal(err)
	}
	parts, err := model.PartsInBlocks()
	if err != nil {
		log.Fatal(err)
	}

	blocks := []kvferry.Block{{Begin: 0, End: 4}, {Begin: 4, End: 8}}
	checkpoint, err := kvferry.CutState(kvferry.Bytes(state), blocks, parts)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(blocks[0].Size, "and", blocks[1].Size, "bytes; a checkpoint:", checkpoint != nil)
	joined, err := kvferry.JoinBlocks(blocks, checkpoint, parts)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("the same state:", bytes.Equal(joined, state))
	// Output:
	// 49520 and 49520 bytes; a checkpoint: false
	// the same state: true
}

// A file keeps a block with its positions, its keys and the model's fingerprint. Reading verifies every byte. The files
// are those of the Python package.
func ExampleBlock_WriteFile() {
	folder, err := os.MkdirTemp("", "blocks")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(folder)
	path := filepath.Join(folder, "first.block")

	block := kvferry.Block{Memory: kvferry.Bytes("what SaveBlocks has written"), Begin: 0, End: 256, Key: "hash of the tokens"}
	if err := block.WriteFile(path); err != nil {
		log.Fatal(err)
	}
	var read kvferry.Block
	if err := read.ReadFile(path); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("positions %d to %d, %s: %s\n", read.Begin, read.End-1, read.Key, read.Memory)

	damaged, err := os.ReadFile(path)
	if err != nil {
		log.Fatal(err)
	}
	damaged[len(damaged)-1]++
	_, err = read.ReadFrom(bytes.NewReader(damaged))
	fmt.Println(err)
	// Output:
	// positions 0 to 255, hash of the tokens: what SaveBlocks has written
	// the state is truncated or its structure is damaged: the checksum is wrong
}

// A checkpoint of a sequence's end goes with the blocks before it. It is as good a Memory as a Buffer, and knows its size.
func ExampleCheckpoint() {
	checkpoint := kvferry.Checkpoint{Memory: kvferry.Bytes("windows"), Position: 511, Key: "hash of the tokens"}
	var file bytes.Buffer
	if _, err := checkpoint.WriteTo(&file); err != nil {
		log.Fatal(err)
	}
	var read kvferry.Checkpoint
	if _, err := read.ReadFrom(&file); err != nil {
		log.Fatal(err)
	}
	checksum, err := read.Checksum()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%d bytes of position %d, checksum %016x\n", read.Size, read.Position, checksum)
	// Output:
	// 7 bytes of position 511, checksum ef76bed429173ee4
}

// Any memory of a device or of the host can be saved and loaded, here bytes of a text.
func ExampleEngine_SaveRegions() {
	engine, err := kvferry.NewEngine(kvferry.EngineOptions{Devices: kvferry.HostOnly})
	if err != nil {
		log.Fatal(err)
	}
	defer engine.Close()

	text := []byte("one.. two.. three")
	regions := []kvferry.Region{ // the words, without what is between them
		{Address: unsafe.Pointer(&text[0]), Width: 3, Rows: 2, Pitch: 6, BufferPitch: 3},
		{Address: unsafe.Pointer(&text[12]), Width: 5, Rows: 1, Offset: 6},
	}
	size, err := kvferry.RegionsSize(regions)
	if err != nil {
		log.Fatal(err)
	}
	saved := make([]byte, size)
	completion, err := engine.SaveRegions(context.Background(), regions, kvferry.Bytes(saved))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s: %d bytes in %d fragments\n", saved, completion.Bytes, completion.Fragments)

	copy(text, "xxxxxxxxxxxxxxxxx")
	if _, err := engine.LoadRegions(context.Background(), regions, kvferry.Bytes(saved)); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", text)
	// Output:
	// onetwothree: 11 bytes in 3 fragments
	// onexxxtwoxxxthree
}

// A Buffer is pinned memory of the engine. PinnedLimit bounds all buffers together.
func ExampleEngine_NewBuffer() {
	engine, err := kvferry.NewEngine(kvferry.EngineOptions{PinnedLimit: 1 << 20, Devices: kvferry.HostOnly})
	if err != nil {
		log.Fatal(err)
	}
	defer engine.Close()
	buffer, err := engine.NewBuffer(600_000)
	if err != nil {
		log.Fatal(err)
	}
	defer buffer.Close()

	_, err = engine.NewBuffer(600_000)
	fmt.Println(errors.Is(err, kvferry.ErrPinnedLimit))
	fmt.Println(kvferry.ErrPinnedLimit)
	// Output:
	// true
	// the engine's limit of pinned memory is reached
}
