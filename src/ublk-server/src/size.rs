//! Sizes as people write them.

/// Reads `256M` and the like: a number of bytes, or of KiB (`K`), MiB (`M`) or
/// GiB (`G`); `KiB`, `MiB` and `GiB` are taken too.
pub fn parse(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match &text[digits.len()..] {
        "" => 1,
        "K" | "k" | "KiB" => 1 << 10,
        "M" | "m" | "MiB" => 1 << 20,
        "G" | "g" | "GiB" => 1 << 30,
        _ => 0,
    };
    let number = digits.parse::<u64>().ok().filter(|_| factor > 0);
    number
        .and_then(|number| number.checked_mul(factor))
        .ok_or_else(|| format!("{text:?} is not a size: write it like 256M or 2G"))
}

/// Writes a size with three digits or so.
pub fn show(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    // For people: what an f64 loses does not show.
    #[allow(clippy::cast_precision_loss)]
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} B")
    } else {
        format!("{value:.1} {}", units[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_and_print() {
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("16M"), Ok(16 << 20));
        assert_eq!(parse("2GiB"), Ok(2 << 30));
        for wrong in ["", "M", "1T", "-1", "1.5G", "99999999999G", "1 M"] {
            assert!(parse(wrong).unwrap_err().contains(wrong));
        }
        assert_eq!(show(1000), "1000 B");
        assert_eq!(show(3 << 19), "1.5 MiB");
    }
}
