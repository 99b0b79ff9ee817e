// Moving bytes between two places in host memory.
#pragma once

#include "memory/pieces.h"

namespace kvf {

// Moves one piece between the memory that it names and the buffer.
void copy_piece(const Piece &piece, unsigned char *buffer, Direction direction);

// Moves a piece between its place in the buffer and `packed`, where its rows follow one another
// without gaps. Its addresses are not read. Save: from `packed` into the buffer.
void copy_packed(const Piece &piece, unsigned char *packed, unsigned char *buffer,
                 Direction direction);

} // namespace kvf
