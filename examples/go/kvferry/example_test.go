package kvferry_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"unsafe"

	"example.org/kvferry"
)

// Memory that something else writes rows into is saved, changed, and loaded again.
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

// A Buffer is pinned memory of the engine's.
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
