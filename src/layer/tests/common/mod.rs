//! Tars made by hand, their conversion into memory, and a picture of the image
//! as erofs-rs, which is not ours, reads it.
#![allow(dead_code)] // each test program uses its part

use accel_layer::{
    LayerError, LayerOptions, LayerSummary, LowerDirectory, LowerError, LowerLookup, NoLower,
    Output, convert_layer,
};
use erofs_rs::{EroFS, backend::SliceImage, types::Inode};
use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    fmt::Write,
    os::unix::fs::PermissionsExt,
};

/// An image in memory.
#[derive(Debug, Default)]
pub struct Memory(pub BTreeMap<u64, Vec<u8>>);

impl Output for Memory {
    type Error = Infallible;

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Infallible> {
        assert!(self.0.insert(offset, bytes.to_vec()).is_none());
        Ok(())
    }
}

impl Memory {
    pub fn image(self) -> Vec<u8> {
        self.0.into_values().collect::<Vec<_>>().concat()
    }
}

/// A tar that grows entry by entry.
#[derive(Default)]
pub struct Tar(Vec<u8>);

/// A header, for entries that a builder of tars would not make.
pub fn header(path: &[u8], kind: u8, size: u64) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.as_old_mut().name[..path.len()].copy_from_slice(path);
    header.set_entry_type(tar::EntryType::new(kind));
    header.set_mode(0o644);
    header.set_uid(1);
    header.set_gid(2);
    header.set_mtime(3);
    header.set_size(size);
    header
}

/// "<length> <key>=<value>\n", the length counting itself.
pub fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while rest + len.to_string().len() != len {
        len = rest + len.to_string().len();
    }
    [format!("{len} {key}=").as_bytes(), value, b"\n"].concat()
}

impl Tar {
    /// An entry with any header; the checksum is made right.
    pub fn raw(&mut self, mut header: tar::Header, data: &[u8]) -> &mut Self {
        header.set_cksum();
        self.bytes(header.as_bytes()).bytes(data).pad()
    }

    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub fn pad(&mut self) -> &mut Self {
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub fn pax(&mut self, records: &[(&str, &[u8])]) -> &mut Self {
        let records: Vec<u8> = records.iter().flat_map(|(k, v)| record(k, v)).collect();
        self.raw(header(b"pax", b'x', records.len() as u64), &records)
    }

    pub fn file(&mut self, path: &str, data: &[u8]) -> &mut Self {
        self.raw(header(path.as_bytes(), b'0', data.len() as u64), data)
    }

    pub fn dir(&mut self, path: &str, mode: u32) -> &mut Self {
        let mut header = header(path.as_bytes(), b'5', 0);
        header.set_mode(mode);
        self.raw(header, b"")
    }

    pub fn link(&mut self, path: &str, kind: u8, target: &str) -> &mut Self {
        let mut header = header(path.as_bytes(), kind, 0);
        header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
        self.raw(header, b"")
    }

    pub fn symlink(&mut self, path: &str, target: &str) -> &mut Self {
        self.link(path, b'2', target)
    }

    pub fn hard(&mut self, path: &str, target: &str) -> &mut Self {
        self.link(path, b'1', target)
    }

    /// The bytes with the two blocks of zeros.
    pub fn end(&self) -> Vec<u8> {
        let mut bytes = self.0.clone();
        bytes.resize(bytes.len() + 1024, 0);
        bytes
    }

    /// The bytes without.
    pub fn open_end(&self) -> Vec<u8> {
        self.0.clone()
    }
}

/// Symbolic links, and entries whose paths lead through them.
pub fn through_symlinks() -> Tar {
    let mut tar = Tar::default();
    tar.dir("usr", 0o755)
        .dir("usr/lib", 0o755)
        .symlink("lib", "usr/lib")
        .file("lib/f", b"1")
        .symlink("out", "/../../usr")
        .file("out/g", b"2")
        .symlink("dangling", "new/place")
        .file("dangling/h", b"3");
    tar
}

/// A sparse file "holes" of 30 bytes as PAX 0.0 has it: "aaaaa" at 10 and "bbbbb" at 20.
pub fn sparse_0_0() -> Tar {
    let mut tar = Tar::default();
    tar.pax(&[
        ("GNU.sparse.size", b"30"),
        ("GNU.sparse.numblocks", b"2"),
        ("GNU.sparse.offset", b"10"),
        ("GNU.sparse.numbytes", b"5"),
        ("GNU.sparse.offset", b"20"),
        ("GNU.sparse.numbytes", b"5"),
    ])
    .file("holes", b"aaaaabbbbb");
    tar
}

/// The same as PAX 1.0 has it.
pub fn sparse_1_0() -> Tar {
    let mut data = b"3\n10\n5\n20\n5\n30\n0\n".to_vec();
    data.resize(512, 0);
    data.extend_from_slice(b"aaaaabbbbb");
    let mut tar = Tar::default();
    tar.pax(&[
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"holes"),
        ("GNU.sparse.realsize", b"30"),
    ])
    .file("GNUSparseFile.1/holes", &data);
    tar
}

pub type Converted<T> = Result<T, LayerError<Infallible>>;

pub fn convert_with(
    blob: &[u8],
    options: &LayerOptions,
    lower: &mut dyn LowerLookup,
) -> Converted<(LayerSummary, Vec<u8>)> {
    let mut memory = Memory::default();
    let summary = convert_layer(blob, options, lower, &mut memory)?;
    let image = memory.image();
    assert_eq!(summary.image.size, image.len() as u64);
    Ok((summary, image))
}

pub fn convert(blob: &[u8]) -> Converted<(LayerSummary, Vec<u8>)> {
    convert_with(blob, &LayerOptions::new("test"), &mut NoLower)
}

/// Options for a layer that lies on another.
pub fn on_another() -> LayerOptions {
    let (below, _) = convert(&[]).expect("an empty layer is one");
    let mut options = LayerOptions::new("test");
    options.parent = Some(below.chain_id);
    options
}

/// The error's whole text, with its causes.
pub fn refusal(blob: &[u8]) -> String {
    let result = convert_with(blob, &on_another(), &mut NoLower);
    chain(&result.expect_err("must be refused"))
}

pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        write!(text, ": {error}").unwrap();
        cause = error.source();
    }
    text
}

/// Lower directories by path.
#[derive(Default)]
pub struct Below(pub HashMap<&'static str, LowerDirectory>, pub Vec<String>);

impl LowerLookup for Below {
    fn directory(&mut self, path: &[&[u8]]) -> Result<LowerDirectory, LowerError> {
        let path = String::from_utf8(path.join(&b'/')).unwrap();
        self.1.push(path.clone());
        Ok(self
            .0
            .get(&*path)
            .cloned()
            .unwrap_or(LowerDirectory::Absent))
    }
}

/// One line for each path: type, mode, owner, time, then what the type has:
/// "c 0:0", "l → target", a file's bytes (or their number); "=path" for further
/// names of a file; attributes last.
pub fn picture(image: &[u8]) -> BTreeMap<String, String> {
    let fs = EroFS::new(SliceImage::new(image)).unwrap();
    let mut paths = vec![("/".to_owned(), fs.super_block().root_inode_id())];
    for entry in fs.walk_dir("/").unwrap() {
        let entry = entry.unwrap();
        let path = entry.dir_entry.path();
        let path = String::from_utf8_lossy(path.as_bytes()).into_owned();
        paths.push((path, entry.dir_entry.nid()));
    }
    paths.sort();
    let mut first: HashMap<u64, String> = HashMap::new();
    let mut picture = BTreeMap::new();
    for (path, nid) in paths {
        if let Some(first) = first.get(&nid) {
            picture.insert(path, format!("= {first}"));
            continue;
        }
        first.insert(nid, path.clone());
        picture.insert(path, line(&fs, fs.get_inode(nid).unwrap()));
    }
    picture
}

fn line(fs: &EroFS<SliceImage<'_>>, inode: Inode) -> String {
    let mode = inode.permissions().mode() & 0o7777;
    let (seconds, nanos) = inode.modified_unix();
    let kind = match format!("{:?}", inode.file_type()).as_str() {
        "Directory" => "d",
        "RegularFile" => "f",
        "Symlink" => "l",
        "Fifo" | "FIFO" => "p",
        name if name.starts_with("Char") => "c",
        name if name.starts_with("Block") => "b",
        name => panic!("erofs-rs calls it {name}"),
    };
    let mut line = format!(
        "{kind} {mode:04o} {}:{} {seconds}",
        inode.uid(),
        inode.gid()
    );
    if nanos != 0 {
        write!(line, ".{nanos:09}").unwrap();
    }
    if let Some((major, minor)) = inode.device() {
        write!(line, " {major}:{minor}").unwrap();
    }
    if inode.is_symlink() {
        let target = fs.read_link_inode(inode).unwrap();
        write!(line, " -> {}", String::from_utf8_lossy(target.as_bytes())).unwrap();
    }
    if inode.is_file() {
        let data = contents(fs, inode);
        if data.len() <= 40 {
            write!(line, " {:?}", String::from_utf8_lossy(&data)).unwrap();
        } else {
            let hash = blake3::hash(&data).to_hex();
            write!(line, " {} bytes {}", data.len(), &hash[..16]).unwrap();
        }
    }
    for (name, value) in fs.xattrs_inode(inode).unwrap() {
        write!(
            line,
            " {}={:?}",
            name.escape_ascii(),
            value.escape_ascii().to_string()
        )
        .unwrap();
    }
    line
}

pub fn contents(fs: &EroFS<SliceImage<'_>>, inode: Inode) -> Vec<u8> {
    let mut data = vec![0; usize::try_from(inode.data_size()).unwrap()];
    let file = fs.open_inode_file(inode).unwrap();
    let mut done = 0;
    while done < data.len() {
        let count = file.read_at(&mut data[done..], done as u64).unwrap();
        assert!(count > 0, "a file ends early");
        done += count;
    }
    data
}

/// Asserts the picture of a layer that lies on another, the root left out.
#[track_caller]
pub fn assert_tree(blob: &[u8], expected: &[(&str, &str)]) {
    let result = convert_with(blob, &on_another(), &mut NoLower);
    let (_, image) = result.unwrap_or_else(|error| panic!("{}", chain(&error)));
    assert_image(&image, expected);
}

#[track_caller]
pub fn assert_image(image: &[u8], expected: &[(&str, &str)]) {
    let mut found = picture(image);
    found.remove("/");
    let expected: BTreeMap<String, String> = expected
        .iter()
        .map(|(path, line)| (path.to_string(), line.to_string()))
        .collect();
    assert_eq!(found, expected);
}

/// The most memory that this process ever had, in KiB.
pub fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
