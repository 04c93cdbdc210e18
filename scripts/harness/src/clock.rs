//! Detects, from QEMU's view of a guest, a processor that has lost its timer.
//!
//! QEMU's software emulation sometimes loses an interrupt of a local APIC's timer (7.2 rarely, 10.0 in six of
//! ten boots): the timer has run down, and its interrupt is neither pending nor in service, or stays in
//! service forever. In mode "one-shot" the kernel rearms the timer when it fires, so the timer never fires
//! again, and tasks that sleep on that processor never wake up. The programs under test are not the cause.

/// Returns the first processor that is halted although its timer has run down. `text` is the output of
/// `info registers -a` and, for each processor, `info lapic`.
pub(crate) fn stopped(text: &str) -> Option<u32> {
    let halted = blocks(text, "CPU#").filter(|(_, block)| block.contains("HLT=1"));
    let halted: Vec<u32> = halted.map(|(cpu, _)| cpu).collect();
    blocks(text, "local APIC state for CPU ").find_map(|(cpu, block)| {
        let line = |word: &str| block.lines().find(|line| line.contains(word)).unwrap_or_default();
        let timer = line("LVTT\t");
        let is_set = timer.contains("one-shot") && !timer.contains("masked");
        let has_run_down = line("initial_count").trim_end().ends_with("current_count = 0")
            && !line("initial_count").contains("initial_count = 0 ");
        (is_set && has_run_down && halted.contains(&cpu)).then_some(cpu)
    })
}

/// Splits `text` at each `word`, and returns the processor number that follows, with the text up to the next
/// `word`.
fn blocks<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = (u32, &'a str)> {
    text.split(word).skip(1).filter_map(|block| {
        let end = block.find(|c: char| !c.is_ascii_digit())?;
        Some((block[..end].parse().ok()?, &block[end..]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Output of QEMU 10.0.2 for a guest whose CPU 0 has lost its timer.
    const STOPPED: &str = "\
CPU#0
RIP=ffffffff81393d27 RFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1
CPU#1
RIP=ffffffff81393d27 RFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1
dumping local APIC state for CPU 0 
LVTTHMR\t 0x00010000 active-hi edge  masked                      Fixed  (vec 0)
LVTT\t 0x000000ec active-hi edge                 one-shot     Fixed  (vec 236)
Timer\t DCR=0x3 (divide by 16) initial_count = 601986 current_count = 0
ISR\t (none)
IRR\t (none)
dumping local APIC state for CPU 1 
LVTTHMR\t 0x00010000 active-hi edge  masked                      Fixed  (vec 0)
LVTT\t 0x000000ec active-hi edge                 one-shot     Fixed  (vec 236)
Timer\t DCR=0x3 (divide by 16) initial_count = 600974 current_count = 271726
ISR\t (none)
IRR\t (none)
";

    #[test]
    fn a_halted_processor_whose_timer_has_run_down_has_lost_it() {
        assert_eq!(stopped(STOPPED), Some(0));
        assert_eq!(
            stopped(&STOPPED.replacen("ISR\t (none)\nIRR\t (none)", "ISR\t 236 \nIRR\t 33 236 ", 1)),
            Some(0)
        );
        for (from, to) in [
            ("current_count = 0", "current_count = 5"),
            // The kernel has stopped the timer.
            ("initial_count = 601986", "initial_count = 0"),
            ("one-shot", "periodic"),
            ("HLT=1", "HLT=0"),
        ] {
            assert_eq!(stopped(&STOPPED.replace(from, to)), None, "{to}");
        }
        assert_eq!(stopped("cannot query QEMU"), None);
    }
}
