//! The 512 bytes of a tar header, and the text of pax records.

use crate::archive::Entry;
use std::ops::Range;

/// Bytes of a header, and the unit of everything in a tar.
pub const BLOCK: usize = 512;

/// The bytes of a header.
pub struct Header(pub [u8; BLOCK]);

impl Header {
    /// A text that ends at its first NUL.
    pub fn text(&self, range: Range<usize>) -> &[u8] {
        until_nul(&self.0[range])
    }

    /// Octal digits between spaces and NULs (nothing is 0), or base-256.
    pub fn number(&self, range: Range<usize>) -> Option<i64> {
        let field = &self.0[range];
        if field[0] & 0x80 != 0 {
            let negative = field[0] & 0x40 != 0;
            let first = if negative { field[0] } else { field[0] & 0x7f };
            let start = i64::from(first.cast_signed());
            return field[1..].iter().try_fold(start, |value, &byte| {
                Some(value.checked_mul(256)? | i64::from(byte))
            });
        }
        let is_fill = |byte: &u8| matches!(byte, b' ' | 0);
        let start = field.iter().position(|byte| !is_fill(byte));
        let Some(start) = start else { return Some(0) };
        let digits = field[start..].split(is_fill).next().unwrap_or_default();
        let digits = std::str::from_utf8(digits).ok()?;
        i64::from_str_radix(digits, 8)
            .ok()
            .filter(|_| !digits.starts_with(['+', '-']))
    }

    /// Whether there are device numbers: not in v7.
    pub fn has_devices(&self) -> bool {
        self.0[257..263] == *b"ustar\0" || self.0[257..265] == *b"ustar  \0"
    }

    pub fn path(&self) -> Vec<u8> {
        let name = self.text(0..100);
        match self.prefix() {
            [] => name.to_vec(),
            prefix => [prefix, b"/", name].concat(),
        }
    }

    fn prefix(&self) -> &[u8] {
        if self.0[257..263] == *b"ustar\0" {
            // star has times behind a shorter one.
            let is_star = self.0[508..] == *b"tar\0";
            return self.text(if is_star { 345..476 } else { 345..500 });
        }
        // GNU has two times in its place, but tars were written (by Go before 1.8)
        // that have a prefix nevertheless.
        let is_time =
            |range: Range<usize>| self.0[range.start] == 0 || self.number(range).is_some();
        if self.0[257..265] == *b"ustar  \0" && !(is_time(345..357) && is_time(357..369)) {
            let prefix = self.text(345..500);
            if prefix.is_ascii() {
                return prefix;
            }
        }
        &[]
    }
}

/// The bytes before the first NUL.
pub fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// A key and its value.
pub type Record = (Vec<u8>, Vec<u8>);

/// What pax records say of a sparse file.
#[derive(Default)]
pub struct PaxSparse {
    pub major: Option<u64>,
    pub minor: Option<u64>,
    pub size: Option<u64>,
    pub real_size: Option<u64>,
    pub name: Option<Vec<u8>>,
    pub map: Vec<u64>,
}

/// Splits `<length> <key>=<value>\n` records.
pub fn parse_records(mut bytes: &[u8]) -> Result<Vec<Record>, &'static str> {
    const PROBLEM: &str = "a pax record that is none";
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let space = bytes
            .iter()
            .take(20)
            .position(|byte| *byte == b' ')
            .ok_or(PROBLEM)?;
        let len = decimal(&bytes[..space]).and_then(|len| usize::try_from(len).ok());
        let (record, rest) = len
            .and_then(|len| bytes.split_at_checked(len))
            .ok_or(PROBLEM)?;
        let record = record
            .get(space + 1..)
            .and_then(|record| record.strip_suffix(b"\n"));
        let record = record.ok_or(PROBLEM)?;
        let equals = record
            .iter()
            .position(|byte| *byte == b'=')
            .ok_or(PROBLEM)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        let text = match key {
            b"path" | b"linkpath" | b"uname" | b"gname" => value,
            _ => key,
        };
        if key.is_empty() || text.contains(&0) {
            return Err(PROBLEM);
        }
        records.push((key.to_vec(), value.to_vec()));
        bytes = rest;
    }
    Ok(records)
}

/// A number of decimal digits only.
fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0u64, |value, byte| {
        let digit = byte.is_ascii_digit().then(|| u64::from(byte - b'0'))?;
        value.checked_mul(10)?.checked_add(digit)
    })
}

/// Lets one pax record speak. One with an empty value leaves the header's word.
pub fn record(
    entry: &mut Entry,
    sparse: &mut PaxSparse,
    key: &[u8],
    value: Vec<u8>,
) -> Result<(), &'static str> {
    if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
        // The last one of a name counts.
        entry.xattrs.insert(name.to_vec(), value);
        return Ok(());
    }
    if value.is_empty() {
        return Ok(());
    }
    let number = |problem| decimal(&value).ok_or(problem);
    let signed = |problem| {
        let (negative, digits) = match value.strip_prefix(b"-") {
            Some(digits) => (true, digits),
            None => (false, &value[..]),
        };
        let number = decimal(digits).and_then(|number| i64::try_from(number).ok());
        number.map(|n| if negative { -n } else { n }).ok_or(problem)
    };
    match key {
        b"path" => entry.path = value,
        b"linkpath" => entry.link = value,
        b"size" => entry.size = number("a pax size that is no number")?,
        b"uid" => entry.uid = signed("a pax uid that is no number")?,
        b"gid" => entry.gid = signed("a pax gid that is no number")?,
        b"mtime" => entry.mtime = time(&value).ok_or("a pax mtime that is no time")?,
        b"GNU.sparse.major" => sparse.major = Some(number("a sparse version that is no number")?),
        b"GNU.sparse.minor" => sparse.minor = Some(number("a sparse version that is no number")?),
        b"GNU.sparse.size" => sparse.size = Some(number("a sparse size that is no number")?),
        b"GNU.sparse.realsize" => {
            sparse.real_size = Some(number("a sparse size that is no number")?);
        }
        b"GNU.sparse.name" => sparse.name = Some(value),
        b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
            // In turns; a map that is not even is refused later.
            sparse.map.push(number("a sparse map that is no numbers")?);
        }
        b"GNU.sparse.map" => {
            sparse.map = value
                .split(|byte| *byte == b',')
                .map(|number| decimal(number).ok_or("a sparse map that is no numbers"))
                .collect::<Result<_, _>>()?;
        }
        _ => {}
    }
    Ok(())
}

/// "[-]seconds[.fraction]"; what is finer than a nanosecond is cut off.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(text) => (true, text),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |byte| *byte == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digits = fraction.iter().chain(std::iter::repeat(&b'0')).take(9);
    let nanos = digits.fold(0, |nanos, digit| nanos * 10 + u32::from(digit - b'0'));
    match (negative, nanos) {
        (false, _) => Some((seconds, nanos)),
        (true, 0) => Some((-seconds, 0)),
        (true, _) => Some((-seconds - 1, 1_000_000_000 - nanos)),
    }
}
