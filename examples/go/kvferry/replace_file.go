package kvferry

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
)

// replaceFile lets `write` write a new file, which then replaces the one at path: at any time, also after a crash of the
// machine, path is the old file or the new one. Anything at path that is no regular file, such as a pipe, is written
// directly.
func replaceFile(path string, write func(io.Writer) error) error {
	path, mode, err := resolve(path)
	if err != nil {
		return err
	}
	if !mode.IsRegular() {
		file, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		return errors.Join(write(file), file.Close())
	}
	name := filepath.Base(path)
	aside := filepath.Join(filepath.Dir(path), fmt.Sprintf(".%.50s.%016x.partial", name, rand.Uint64()))
	file, err := os.OpenFile(aside, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return err
	}
	err = write(file)
	if err == nil && mode.Perm() != 0 {
		err = file.Chmod(mode.Perm())
	}
	if err == nil {
		err = file.Sync()
	}
	if closed := file.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = os.Rename(aside, path)
	}
	if err != nil {
		os.Remove(aside)
		return err
	}
	return syncFolder(filepath.Dir(path))
}

// resolve follows links, so that a link stays and leads to the new file. It returns the mode of what is there; 0 for
// nothing.
func resolve(path string) (string, fs.FileMode, error) {
	followed, err := filepath.EvalSymlinks(path)
	if errors.Is(err, fs.ErrNotExist) {
		return path, 0, nil
	}
	if err != nil {
		return "", 0, err
	}
	found, err := os.Stat(followed)
	if err != nil {
		return "", 0, err
	}
	return followed, found.Mode(), nil
}

func syncFolder(path string) error {
	folder, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(folder.Sync(), folder.Close())
}
