package kvferry

import (
	"encoding/binary"
	"math/bits"
)

// Constants of XXH64, from its specification (doc/xxhash_spec.md of xxHash).
const (
	prime1 uint64 = 0x9E3779B185EBCA87
	prime2 uint64 = 0xC2B2AE3D27D4EB4F
	prime3 uint64 = 0x165667B19E3779F9
	prime4 uint64 = 0x85EBCA77C2B2AE63
	prime5 uint64 = 0x27D4EB2F165667C5
)

// xxh64 returns the XXH64 of data, with seed 0. It finds damage, not forgery.
func xxh64(data []byte) uint64 {
	length := uint64(len(data))
	hash := prime5
	if len(data) >= 32 {
		hash, data = xxh64Stripes(data)
	}
	hash += length
	for ; len(data) >= 8; data = data[8:] {
		hash ^= xxh64Round(0, binary.LittleEndian.Uint64(data))
		hash = bits.RotateLeft64(hash, 27)*prime1 + prime4
	}
	if len(data) >= 4 {
		hash ^= uint64(binary.LittleEndian.Uint32(data)) * prime1
		hash = bits.RotateLeft64(hash, 23)*prime2 + prime3
		data = data[4:]
	}
	for _, b := range data {
		hash ^= uint64(b) * prime5
		hash = bits.RotateLeft64(hash, 11) * prime1
	}
	hash ^= hash >> 33
	hash *= prime2
	hash ^= hash >> 29
	hash *= prime3
	return hash ^ hash>>32
}

// xxh64Stripes hashes all stripes of 32 bytes. It returns what follows them, too.
func xxh64Stripes(data []byte) (uint64, []byte) {
	v1, v2, v3, v4 := prime1, prime2, uint64(0), uint64(0)
	v1 += prime2 // in two steps, because the sum of the constants overflows
	v4 -= prime1
	for ; len(data) >= 32; data = data[32:] {
		v1 = xxh64Round(v1, binary.LittleEndian.Uint64(data))
		v2 = xxh64Round(v2, binary.LittleEndian.Uint64(data[8:]))
		v3 = xxh64Round(v3, binary.LittleEndian.Uint64(data[16:]))
		v4 = xxh64Round(v4, binary.LittleEndian.Uint64(data[24:]))
	}
	hash := bits.RotateLeft64(v1, 1) + bits.RotateLeft64(v2, 7) + bits.RotateLeft64(v3, 12) + bits.RotateLeft64(v4, 18)
	for _, v := range [...]uint64{v1, v2, v3, v4} {
		hash = (hash^xxh64Round(0, v))*prime1 + prime4
	}
	return hash, data
}

func xxh64Round(accumulator, lane uint64) uint64 {
	return bits.RotateLeft64(accumulator+lane*prime2, 31) * prime1
}
