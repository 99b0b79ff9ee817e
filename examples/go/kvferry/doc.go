// Package kvferry saves and loads the KV cache of a running language model: it moves sequences between the accelerator
// and host memory, fast, while the model goes on decoding other sequences.
//
// It works on the libllama that the program has loaded, unmodified, beside any bindings of llama.cpp: it needs the
// address of the llama_context and the lock that guards it. In short, without the handling of errors (the example below
// is a whole program):
//
//	engine, err := kvferry.NewEngine(kvferry.EngineOptions{})
//	defer engine.Close()
//	model, err := engine.Attach(llamaContext, &lock, kvferry.AttachOptions{})
//	defer model.Close()
//
//	sequence := model.Sequence(0)
//	size, err := sequence.Size()            // moves nothing
//	buffer, err := engine.NewBuffer(size)   // pinned memory; or kvferry.Bytes of any []byte
//	defer buffer.Close()
//	_, err = sequence.Save(ctx, buffer)     // other sequences may be decoded meanwhile
//	_, err = sequence.Load(ctx, buffer)
//
// # Goroutines and threads
//
// A transfer blocks the goroutine that calls Save or Load, and no thread: waiting goroutines are not inside a C call. C
// never calls Go. One goroutine of each engine takes the completions, in batches, when Go's poller reports them.
// [Engine.Attach] says when kvferry holds the context's lock.
//
// A decode of one sequence may have to wait for a transfer of another sequence, inside llama_decode, where llama.cpp
// would overwrite memory of the transfer (the table in kvferry.h says when). The wait ends when the transfer has ended,
// and a transfer that follows a stream waits for that stream. So a goroutine that must decode before it lets the stream
// go on waits for ever; see [AfterStream].
//
// # Ownership
//
// Whoever makes an Engine, a Llama, a Buffer or a Registration closes it: first the Llama, then its context and its
// Engine. Buffers may outlive the engine. Memory of a transfer in flight cannot be freed: see [Memory].
//
// # Blocks and checkpoints
//
// A conversation need not be saved whole after every turn. [Sequence.SaveBlocks] saves the tokens at some positions, and
// [Sequence.LoadBlocks] makes a sequence of blocks, also of blocks that several conversations share. Sliding windows and
// recurrent layers are not in blocks: [Sequence.SaveCheckpoint] saves them, small, at the sequence's end.
// [Llama.BlocksAllowed] tells what the cache of a model needs. [Block.WriteFile] and [Checkpoint.WriteFile] keep them in
// files, which the Python package reads and writes, too. [CutState] and [JoinBlocks] turn whole states into blocks and
// back, without a context.
//
// # Errors and cancellation
//
// Errors are of type [*Error]; errors.Is finds their [Status], such as [ErrCacheFull]. When the context.Context of a
// transfer ends, the transfer is asked to end early, and the call still waits for its end: when it returns, the library
// no longer uses the memory. The error is then [ErrCancelled], and errors.Is finds the context's cause too.
//
// Names and texts are those of the C library (kvferry.h) and of the Python package.
package kvferry

// kvferry-go.pc requires kvferry. pkgconf looks for that beside the file too, because the file is given by its path: so
// it finds a library that was built in the source tree, without any setting.

// #cgo pkg-config: ./kvferry-go.pc
import "C"
