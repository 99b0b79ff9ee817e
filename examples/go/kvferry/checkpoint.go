package kvferry

import (
	"io"
	"os"
)

// Checkpoint is the state of a sequence's sliding windows and recurrent layers at one position, with what a program
// knows of it. A *Checkpoint serves as Memory: SaveCheckpoint writes it, and LoadBlocks and JoinBlocks read it.
type Checkpoint struct {
	// Memory is where the bytes are.
	Memory Memory
	// Position is the last position of the sequence when the checkpoint was saved. The last block that is loaded with
	// the checkpoint ends behind this position. The program sets it: libllama's llama_memory_seq_pos_max tells.
	Position int
	// Size is how many bytes of Memory the checkpoint takes. SaveCheckpoint sets it. For a load, 0 means all of Memory.
	Size int
	// Key is as Block.Key: of all tokens up to the checkpoint.
	Key string
	// Fingerprint is as Block.Fingerprint.
	Fingerprint string
}

func (*Checkpoint) isMemory() {}

// Checksum returns the XXH64 of the checkpoint's bytes.
//
// Errors: ErrInvalidArgument (Memory is nil or has been closed, or Size is not within it).
func (c *Checkpoint) Checksum() (uint64, error) { return checksum(c.Memory, c.Size) }

func checksum(memory Memory, size int) (uint64, error) {
	bytes, buffer, err := claimPart(memory, size)
	if err != nil {
		return 0, err
	}
	defer buffer.release()
	return xxh64(bytes), nil
}

// WriteTo is as Block.WriteTo.
func (c *Checkpoint) WriteTo(w io.Writer) (int64, error) {
	header := partHeader{Fingerprint: orNone(c.Fingerprint)}
	if err := header.setPosition("position", c.Position); err != nil {
		return 0, err
	}
	header.setKey("key", c.Key)
	bytes, buffer, err := claimPart(c.Memory, c.Size)
	if err != nil {
		return 0, err
	}
	defer buffer.release()
	return writePart(w, "checkpoint", header, bytes)
}

// ReadFrom is as Block.ReadFrom.
func (c *Checkpoint) ReadFrom(r io.Reader) (int64, error) {
	var read Checkpoint
	header, memory, size, n, err := readPartInto(r, "checkpoint", c.Memory)
	if err != nil {
		if size != 0 {
			c.Size = size
		}
		return n, err
	}
	if read.Position, err = header.position("position"); err != nil {
		return n, err
	}
	if read.Key, err = header.key("key"); err != nil {
		return n, err
	}
	read.Memory, read.Size, read.Fingerprint = memory, size, header.fingerprint()
	*c = read
	return n, nil
}

// WriteFile is as Block.WriteFile.
func (c *Checkpoint) WriteFile(path string) error {
	return replaceFile(path, func(w io.Writer) error {
		_, err := c.WriteTo(w)
		return err
	})
}

// ReadFile is as Block.ReadFile.
func (c *Checkpoint) ReadFile(path string) error { return readFile(path, c) }

func readFile(path string, part io.ReaderFrom) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	_, err = part.ReadFrom(file)
	return err
}

// readPartInto reads a file into memory, or into new memory if that is nil. With ErrBufferTooSmall, size is what the part
// needs; with other errors it is 0.
func readPartInto(r io.Reader, kind string, memory Memory) (header partHeader, filled Memory, size int, n int64, err error) {
	var into []byte
	if memory != nil {
		bytes, buffer, err := claimPart(memory, 0)
		if err != nil {
			return header, nil, 0, 0, err
		}
		defer buffer.release()
		into = bytes[:len(bytes):len(bytes)]
		if into == nil {
			into = []byte{}
		}
	}
	header, data, n, err := readPart(r, kind, into)
	if err != nil {
		if header.Bytes != nil {
			size = int(*header.Bytes)
		}
		return header, nil, size, n, err
	}
	if memory == nil {
		memory = Bytes(data)
	}
	return header, memory, len(data), n, nil
}
