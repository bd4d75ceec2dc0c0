package cascade.peers;

import java.nio.ByteBuffer;
import org.apache.kafka.common.serialization.Serde;
import org.apache.kafka.common.serialization.Serdes;

/** Count and sum of a key for each of the last 30 days with transactions, the oldest first. */
final class DayTotals {
    static final long DAY_MS = 86_400_000L;
    static final Serde<DayTotals> SERDE =
        Serdes.serdeFrom((topic, totals) -> totals == null ? null : totals.bytes(), (topic, bytes) -> read(bytes));
    private static final int DAYS_MAX = 30;
    private static final int DAY_BYTES = 2 * Integer.BYTES + Double.BYTES;

    /** Of 1, 7 and 30 days, as of the last transaction. */
    final int[] counts = new int[3];
    final double[] sums = new double[3];

    private final int[] days = new int[DAYS_MAX + 1];
    private final int[] dayCounts = new int[DAYS_MAX + 1];
    private final double[] daySums = new double[DAYS_MAX + 1];
    private int size;

    private static DayTotals read(byte[] bytes) {
        return bytes == null ? null : from(ByteBuffer.wrap(bytes));
    }

    static DayTotals from(ByteBuffer in) {
        DayTotals found = new DayTotals();
        found.size = in.getInt();
        for (int at = 0; at < found.size; at++) {
            found.days[at] = in.getInt();
            found.dayCounts[at] = in.getInt();
            found.daySums[at] = in.getDouble();
        }
        return found;
    }

    int length() {
        return Integer.BYTES + size * DAY_BYTES;
    }

    void write(ByteBuffer out) {
        out.putInt(size);
        for (int at = 0; at < size; at++) {
            out.putInt(days[at]).putInt(dayCounts[at]).putDouble(daySums[at]);
        }
    }

    private byte[] bytes() {
        ByteBuffer out = ByteBuffer.allocate(length());
        write(out);
        return out.array();
    }

    /** Adds a transaction and updates counts and sums; a late transaction counts as of the newest day. */
    void add(long timeMs, double amount) {
        int today = (int) (timeMs / DAY_MS);
        if (size == 0 || days[size - 1] < today) {
            days[size] = today;
            dayCounts[size] = 0;
            daySums[size++] = 0.0;
            forget(today - DAYS_MAX);
        }
        today = days[size - 1];
        dayCounts[size - 1]++;
        daySums[size - 1] += amount;
        counts[0] = dayCounts[size - 1];
        sums[0] = daySums[size - 1];
        counts[1] = counts[2] = 0;
        sums[1] = sums[2] = 0.0;
        for (int at = 0; at < size; at++) {
            counts[2] += dayCounts[at];
            sums[2] += daySums[at];
            if (days[at] > today - 7) {
                counts[1] += dayCounts[at];
                sums[1] += daySums[at];
            }
        }
    }

    /** Removes the days up to this day. */
    private void forget(int last) {
        int old = 0;
        while (days[old] <= last) {
            old++;
        }
        if (old > 0) {
            size -= old;
            System.arraycopy(days, old, days, 0, size);
            System.arraycopy(dayCounts, old, dayCounts, 0, size);
            System.arraycopy(daySums, old, daySums, 0, size);
        }
    }
}
