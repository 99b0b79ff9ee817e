// Package examples shows how a program that decodes with yzma saves and loads with kvferry.
package examples

import (
	"cmp"
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"example.org/kvferry"
	"github.com/hybridgroup/yzma/pkg/llama"
)

var (
	library = cmp.Or(os.Getenv("KVFERRY_LLAMA_LIB"), "../../build/llama")
	file    = "../../build/models/kvcache.gguf"
)

func TestMain(m *testing.M) {
	for _, needed := range []string{filepath.Join(library, "libllama.so"), file} {
		if _, err := os.Stat(needed); err != nil {
			fmt.Println("skipped (run `make go-kvcache` in the root of kvferry):", err)
			os.Exit(0)
		}
	}
	m.Run()
}

// A sequence is saved while another one decodes, and goes on in a third.
func Example() {
	folder, err := filepath.Abs(library)
	if err != nil {
		log.Fatal(err)
	}
	if err := llama.Load(folder); err != nil {
		log.Fatal(err)
	}
	llama.LogSet(llama.LogSilent())
	llama.Init()
	model, err := llama.ModelLoadFromFile(file, llama.ModelDefaultParams())
	if err != nil {
		log.Fatal(err)
	}
	defer llama.ModelFree(model)
	params := llama.ContextDefaultParams()
	params.NSeqMax, params.NCtx = 3, 3*256
	params.NThreads, params.NThreadsBatch = 1, 1
	llamaContext, err := llama.InitFromModel(model, params)
	if err != nil {
		log.Fatal(err)
	}
	defer llama.Free(llamaContext)

	// The lock goes around everything that is done with the context.
	var lock sync.Mutex
	decode := func(sequence llama.SeqId, position int, tokens ...llama.Token) {
		lock.Lock()
		defer lock.Unlock()
		batch := llama.BatchInit(int32(len(tokens)), 0, 1)
		defer llama.BatchFree(batch)
		for i, token := range tokens {
			if err := batch.Add(token, llama.Pos(position+i), []llama.SeqId{sequence}, i == len(tokens)-1); err != nil {
				log.Fatal(err)
			}
		}
		if status, err := llama.Decode(llamaContext, batch); err != nil || status != 0 {
			log.Fatal(status, err)
		}
	}
	decode(0, 0, 3, 1, 4, 1, 5, 9, 2, 6)

	engine, err := kvferry.NewEngine(kvferry.EngineOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer engine.Close()
	ferry, err := engine.Attach(uintptr(llamaContext), &lock, kvferry.AttachOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer ferry.Close()

	size, err := ferry.Sequence(0).Size()
	if err != nil {
		log.Fatal(err)
	}
	buffer, err := engine.NewBuffer(size)
	if err != nil {
		log.Fatal(err)
	}
	defer buffer.Close()
	saved := make(chan error)
	go func() {
		_, err := ferry.Sequence(0).Save(context.Background(), buffer)
		saved <- err
	}()
	decode(1, 0, 2, 7, 1, 8) // meanwhile
	if err := <-saved; err != nil {
		log.Fatal(err)
	}

	if _, err := ferry.Sequence(2).Load(context.Background(), buffer); err != nil {
		log.Fatal(err)
	}
	decode(2, 8, 5) // as sequence 0 would
	again, err := ferry.Sequence(2).Size()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("saved and loaded", size, "bytes; one token more takes", again-size)
	// Output:
	// saved and loaded 98720 bytes; one token more takes 12300
}
