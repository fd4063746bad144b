//! How much main memory there is.

use std::fs;

/// Bytes of main memory: the machine's, or the limit of this container.
#[derive(Clone, Copy, Debug)]
pub struct MainMemory {
    pub total: u64,
    /// Can be allocated without swapping.
    pub available: u64,
}

impl MainMemory {
    /// As reported by Linux; `None` if it does not report it.
    pub fn now() -> Option<Self> {
        let text = fs::read_to_string("/proc/meminfo").ok()?;
        let kib = |name: &str| -> Option<u64> {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            line.trim().strip_suffix("kB")?.trim().parse().ok()
        };
        let memory = Self { total: kib("MemTotal")? << 10, available: kib("MemAvailable")? << 10 };
        let limit = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
        match limit("/sys/fs/cgroup/memory.max").filter(|most| *most < memory.total) {
            None => Some(memory),
            Some(most) => {
                let used = limit("/sys/fs/cgroup/memory.current").unwrap_or(0);
                Some(Self { total: most, available: memory.available.min(most.saturating_sub(used)) })
            }
        }
    }
}
