//! How many layers are worked on at a time.

use std::fs;
use std::path::Path;
use std::thread;

/// What a layer in work takes of memory, in bytes, besides its directory tree and the
/// window of a zstd frame. Windows are a few MiB but for layers made with `--long`,
/// which nothing tells before they are read.
const PER_LAYER: u64 = 100 << 20;

/// As many as there are processors, and no more than memory is free for.
pub fn default() -> usize {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let memory = [available(), allowed()].into_iter().flatten().min();
    let fit = memory.map_or(u64::MAX, |memory| memory / PER_LAYER);
    processors
        .min(usize::try_from(fit).unwrap_or(usize::MAX))
        .max(1)
}

/// Bytes that the machine has left; `None` if it does not tell.
fn available() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

/// What the process's control group allows (version 2, or 1 as containers see
/// it), in bytes; `None` without a limit.
fn allowed() -> Option<u64> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"));
    let root = Path::new("/sys/fs/cgroup");
    let mut limits: Vec<_> = own
        .map(|own| root.join(own))
        .iter()
        .flat_map(|directory| directory.ancestors())
        .take_while(|directory| directory.starts_with(root))
        .map(|directory| directory.join("memory.max"))
        .collect();
    limits.push(root.join("memory/memory.limit_in_bytes"));
    limits
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok()?.trim().parse().ok())
        .min()
}
