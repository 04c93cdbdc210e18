//! Whether a guest's clock stands still, by what its kernel prints for sysrq q.
//!
//! QEMU's software emulation (7.2 and 10.0 were seen to) loses an interrupt of a local APIC's timer now and then, when the
//! host is busy. The timer fires once each time that the kernel sets it, and the kernel sets it again when it has fired. So
//! every timer of that processor has expired for ever, and whatever sleeps there does not wake up. No program is the reason.

/// How long a timer may be overdue, in nanoseconds: more than a busy host takes to run a processor of the guest again.
const OVERDUE: u64 = 10_000_000_000;

/// The first processor whose next timer is overdue in the kernel's list of timers, if `text` has one.
pub(crate) fn stopped(text: &str) -> Option<u32> {
    let now = text.lines().find_map(|line| number_behind(line, "now at "))?;
    let mut cpu = None;
    for line in text.lines() {
        if let Some(number) = number_behind(line, "cpu: ") {
            cpu = u32::try_from(number).ok();
        }
        let next = if line.contains(".expires_next") { number_behind(line, ": ") } else { None };
        if next.is_some_and(|next| now.saturating_sub(next) > OVERDUE) {
            return cpu;
        }
    }
    None
}

fn number_behind(line: &str, word: &str) -> Option<u64> {
    let (_, rest) = line.split_once(word)?;
    let digits = rest.trim_start();
    let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    digits[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(first: u64, second: u64) -> String {
        format!(
            "sysrq: Show clockevent devices & pending hrtimers (no others)\nTimer List Version: v0.10\n\
             now at 93108124705 nsecs\n\ncpu: 0\n clock 0:\n  .expires_next   : {first} nsecs\n  .hres_active    : 1\n\
             cpu: 1\n  .expires_next   : {second} nsecs\n"
        )
    }

    #[test]
    fn a_timer_that_should_have_fired_long_ago_is_a_stopped_clock() {
        assert_eq!(stopped(&list(28_920_000_000, 93_110_000_000)), Some(0));
        assert_eq!(stopped(&list(93_110_000_000, 28_920_000_000)), Some(1));
        // A busy host is late, and a processor may have no timer at all.
        assert_eq!(stopped(&list(92_000_000_000, i64::MAX as u64)), None);
        assert_eq!(stopped("QEMU cannot be asked"), None);
    }
}
