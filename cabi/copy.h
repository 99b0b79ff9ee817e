// Moving bytes between two places in host memory.
#pragma once

#include "layout.h"

namespace kvf {

// Moves one piece between the memory that it names and the buffer.
void copy_piece(const Piece &piece, unsigned char *buffer, Direction direction);

} // namespace kvf
