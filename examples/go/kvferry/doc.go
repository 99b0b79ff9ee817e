// Package kvferry saves and loads the KV cache of a running language model: between the accelerator and host memory,
// fast, while the model goes on decoding other sequences.
//
//	engine, err := kvferry.NewEngine(kvferry.EngineOptions{})
//	defer engine.Close()
//	model, err := engine.Attach(uintptr(llamaContext), &lock, kvferry.AttachOptions{})
//	defer model.Close()
//
//	sequence := model.Sequence(0)
//	size, err := sequence.Size()            // moves nothing
//	buffer, err := engine.NewBuffer(size)   // pinned; or kvferry.Bytes of any []byte
//	_, err = sequence.Save(ctx, buffer)     // other sequences decode meanwhile
//	_, err = sequence.Load(ctx, buffer)
//
// It works on the llama.cpp that the program has loaded, unmodified; with yzma, for instance, llamaContext is a
// llama.Context. A transfer blocks the goroutine that asked for it, and others only where they want the same context
// while it is recorded or copied aside (Engine.Attach says when). Waiting goroutines stand in no C call, and C calls no
// Go. One goroutine per engine takes the completions, in batches, when Go's poller says that there are some.
// Cancelling a context asks its transfer to end early; the call still waits for the end, so memory is never in use
// behind the caller's back.
//
// The names, and the texts of the errors, are those of the C library (kvferry.h) and of the Python package.
package kvferry

// kvferry-go.pc requires kvferry. It is given by its path so that pkgconf, which looks for what a file requires beside
// the file too, finds a library that was built in the source tree without any setting.

// #cgo pkg-config: ./kvferry-go.pc
import "C"
