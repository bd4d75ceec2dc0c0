package cascade.peers;

import java.util.HashMap;
import java.util.Map;

/** The command line that all peers share: --name=value. */
final class Options {
    private final Map<String, String> values = new HashMap<>();

    Options(String[] arguments) {
        for (String argument : arguments) {
            String[] parts = argument.split("=", 2);
            if (parts.length != 2 || !parts[0].startsWith("--")) {
                throw new IllegalArgumentException(argument + ": write --name=value");
            }
            values.put(parts[0].substring(2), parts[1]);
        }
    }

    String text(String name) {
        String value = values.get(name);
        if (value == null) {
            throw new IllegalArgumentException("--" + name + " is missing");
        }
        return value;
    }

    boolean has(String name) {
        return values.containsKey(name);
    }

    double number(String name, double otherwise) {
        return has(name) ? Double.parseDouble(text(name)) : otherwise;
    }
}
