package kvferry_test

import (
	"encoding/json"
	"errors"
	"os"
	"testing"
	"time"
	"unsafe"

	"example.org/kvferry"
)

const legacyStream = 1 // CU_STREAM_LEGACY, CUDA's default stream

func newEngine(tb testing.TB) *kvferry.Engine {
	tb.Helper()
	engine, err := kvferry.NewEngine(kvferry.EngineOptions{Devices: kvferry.HostOnly})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := engine.Close(); err != nil {
			tb.Error(err)
		}
	})
	return engine
}

// newCUDAEngine makes an engine on the simulated driver that KVFERRY_SIMULATED_CUDA names, else on the real driver.
func newCUDAEngine(t *testing.T) *kvferry.Engine {
	t.Helper()
	if driver := os.Getenv("KVFERRY_SIMULATED_CUDA"); driver != "" {
		t.Setenv("KVFERRY_CUDA_DRIVER", driver)
	}
	engine, err := kvferry.NewEngine(kvferry.EngineOptions{Devices: kvferry.RequireCUDA})
	if errors.Is(err, kvferry.ErrNoDevice) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := engine.Close(); err != nil {
			t.Error(err)
		}
	})
	return engine
}

func newBuffer(tb testing.TB, engine *kvferry.Engine, size int) *kvferry.Buffer {
	tb.Helper()
	buffer, err := engine.NewBuffer(size)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := buffer.Close(); err != nil {
			tb.Error(err)
		}
	})
	return buffer
}

// engineState is a part of what Engine.Describe returns.
type engineState struct {
	InFlight int `json:"jobs_in_flight"`
	Pool     struct{ Mapped, Free int64 }
}

func stateOf(tb testing.TB, engine *kvferry.Engine) (state engineState) {
	tb.Helper()
	text, err := engine.Describe()
	if err == nil {
		err = json.Unmarshal(text, &state)
	}
	if err != nil {
		tb.Fatal(err)
	}
	return state
}

func inFlight(tb testing.TB, engine *kvferry.Engine) int { return stateOf(tb, engine).InFlight }

// expectIdle checks that no transfer is in flight. The engine counts a job until a moment after its completion.
func expectIdle(t *testing.T, engine *kvferry.Engine) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); inFlight(t, engine) > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d jobs in flight", inFlight(t, engine))
		}
	}
}

// bytesTaken returns the bytes of the buffers that have not been returned to the pool.
func bytesTaken(tb testing.TB, engine *kvferry.Engine) int64 {
	pool := stateOf(tb, engine).Pool
	return pool.Mapped - pool.Free
}

// regionsOf returns one region: all of the memory.
func regionsOf(memory []byte) []kvferry.Region {
	return []kvferry.Region{{Address: unsafe.Pointer(unsafe.SliceData(memory)), Width: uint64(len(memory)), Rows: 1}}
}

func pattern(size int, seed byte) []byte {
	memory := make([]byte, size)
	for i := range memory {
		memory[i] = byte(i*7) + byte(i>>8) + seed
	}
	return memory
}

func isClosed(done chan struct{}) bool {
	select {
	case <-done:
		return true
	default:
		return false
	}
}

func countDescriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
