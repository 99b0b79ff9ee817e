package kvferry_test

import (
	"context"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"example.org/kvferry"
	"example.org/kvferry/internal/baseline"
)

const small = 4096 // bytes of a small save

// reportCPU reports how much processor time a job took in all threads, C's included. The time per job alone says little
// on a machine where several threads share the cores.
func reportCPU(b *testing.B, before time.Duration) {
	b.ReportMetric(float64(baseline.CPU()-before)/float64(b.N), "cpu-ns/op")
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "saves/s")
}

// benchmarkSaves saves 4 KiB of C's memory into buffers of the engine, on `depth` goroutines.
func benchmarkSaves(b *testing.B, ctx context.Context, depth int, goMemory bool) {
	engine := newEngine(b)
	sources := baseline.Alloc(depth * small)
	defer baseline.Free(sources)
	var next atomic.Int64
	var group sync.WaitGroup
	b.ReportAllocs()
	start := make(chan struct{})
	var ready sync.WaitGroup
	for i := range depth {
		group.Add(1)
		ready.Add(1)
		go func() {
			defer group.Done()
			regions := []kvferry.Region{{Address: unsafe.Pointer(&sources[i*small]), Width: small, Rows: 1}}
			var buffer *kvferry.Buffer
			own := make([]byte, small)
			if !goMemory {
				buffer = newBuffer(b, engine, small)
				defer buffer.Close()
			}
			ready.Done()
			<-start
			for next.Add(1) <= int64(b.N) {
				var err error
				if goMemory {
					_, err = engine.SaveRegions(ctx, regions, kvferry.Bytes(own), kvferry.WithPriority(kvferry.Urgent))
				} else {
					_, err = engine.SaveRegions(ctx, regions, buffer, kvferry.WithPriority(kvferry.Urgent))
				}
				if err != nil {
					b.Error(err)
					return
				}
			}
		}()
	}
	ready.Wait()
	runtime.GC()
	b.ResetTimer()
	cpu := baseline.CPU()
	close(start)
	group.Wait()
	b.StopTimer()
	reportCPU(b, cpu)
}

// BenchmarkSaveOneByOne measures how long a program waits for a completion: there is one job after the other.
func BenchmarkSaveOneByOne(b *testing.B) {
	cancellable, cancel := context.WithCancel(context.Background())
	defer cancel()
	b.Run("C", func(b *testing.B) { benchmarkC(b, 1) })
	b.Run("Go", func(b *testing.B) { benchmarkSaves(b, context.Background(), 1, false) })
	b.Run("Go/cancellable", func(b *testing.B) { benchmarkSaves(b, cancellable, 1, false) })
}

// BenchmarkSaveMany measures how much work a job is: many jobs are in flight.
func BenchmarkSaveMany(b *testing.B) {
	const depth = 256
	cancellable, cancel := context.WithCancel(context.Background())
	defer cancel()
	b.Run("C", func(b *testing.B) { benchmarkC(b, depth) })
	b.Run("Go", func(b *testing.B) { benchmarkSaves(b, context.Background(), depth, false) })
	b.Run("Go/cancellable", func(b *testing.B) { benchmarkSaves(b, cancellable, depth, false) })
	b.Run("Go/bytes", func(b *testing.B) { benchmarkSaves(b, context.Background(), depth, true) })
}

func benchmarkC(b *testing.B, depth int) {
	cpu := baseline.CPU()
	if err := baseline.Saves(b.N, depth, small); err != nil {
		b.Fatal(err)
	}
	b.StopTimer()
	reportCPU(b, cpu)
}

// BenchmarkCompletionToGoroutine measures the time from the end of a job until the goroutine runs again. The engine copies
// little host memory during the call. A thread copies more, and then the goroutine must be woken.
func BenchmarkCompletionToGoroutine(b *testing.B) {
	b.Run("4KiB", func(b *testing.B) { benchmarkLatency(b, small) })
	b.Run("64KiB", func(b *testing.B) { benchmarkLatency(b, 64<<10) })
}

func benchmarkLatency(b *testing.B, size int) {
	engine := newEngine(b)
	buffer := newBuffer(b, engine, size)
	source := baseline.Alloc(size)
	defer baseline.Free(source)
	regions := regionsOf(source)
	latencies := make([]time.Duration, b.N)
	b.ResetTimer()
	for i := range b.N {
		completion, err := engine.SaveRegions(context.Background(), regions, buffer)
		if err != nil {
			b.Fatal(err)
		}
		latencies[i] = baseline.Monotonic() - completion.Finished
	}
	b.StopTimer()
	slices.Sort(latencies)
	b.ReportMetric(float64(latencies[b.N/2]), "p50-ns")
	b.ReportMetric(float64(latencies[b.N*99/100]), "p99-ns")
}
