package kvferry_test

import (
	"encoding/json"
	"testing"

	"example.org/kvferry"
)

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

// engineState is what Engine.Describe says about its use.
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

// bytesTaken is how many bytes of the pool's buffers have not been given back.
func bytesTaken(tb testing.TB, engine *kvferry.Engine) int64 {
	pool := stateOf(tb, engine).Pool
	return pool.Mapped - pool.Free
}
