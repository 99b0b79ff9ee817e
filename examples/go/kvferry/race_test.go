//go:build race

package kvferry_test

const raceEnabled = true
