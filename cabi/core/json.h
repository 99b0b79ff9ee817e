// What little JSON the descriptions need.
#pragma once

#include <string>
#include <string_view>

#include "core/status.h"

namespace kvf {

inline std::string json_quote(std::string_view text) {
    std::string quoted = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') {
            quoted += '\\';
            quoted += c;
        } else if (static_cast<unsigned char>(c) < 0x20) {
            quoted += format("\\u%04x", c);
        } else {
            quoted += c;
        }
    }
    return quoted + '"';
}

} // namespace kvf
